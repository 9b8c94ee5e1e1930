"""What ``ShardedEMA`` does, one subject a file. ``dist_ema/ema.py`` has the signatures and their documentation.

==================  ================================================================================
file                subject
==================  ================================================================================
``average.py``      ``Average``: everything that one ``ShardedEMA`` knows, and how a call begins
``update.py``       ``update()``, ``attach()``, ``expect()``
``visit.py``        ``average_parameters()`` and ``copy_to()``: the average in a model
``tensors.py``      ``full_state_dict()``, ``iter_full_tensors()``, ``fingerprint()``, ``metrics()``
``files.py``        ``save()``, ``load()``, ``export()``, ``snapshot()``
``state_dict.py``   ``state_dict()`` and ``load_state_dict()``, for ``torch.distributed.checkpoint``
``rebind.py``       ``rebind()``: the same average for another wrapping of the model
``batch_norm.py``   ``update_bn()``
==================  ================================================================================

Every function takes the ``Average`` first. These files import ``average.py`` and not each other, except that
``update.py`` has ``files.py`` write snapshots, and ``batch_norm.py`` computes inside a visit.
"""

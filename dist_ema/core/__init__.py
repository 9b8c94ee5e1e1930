"""Implements ``ShardedEMA``, one subject a file. ``dist_ema/ema.py`` has the signatures and their documentation.

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

Where questions that span several packages are answered:

==============================================================  ===============================================
question                                                        read
==============================================================  ===============================================
Which elements does a rank average under HSDP?                  ``geometry/shares.py``, ``engines/dtensor.py``
What makes a bf16 shadow move?                                  ``kernels/rounding.py``
Who writes which bytes in ``save()``?                           ``checkpoints/contents.py``, ``comm/catalogue.py``
What happens if a rank dies in ``average_parameters()``?        ``core/visit.py``, ``core/swap.py``
How does ``update()`` know that a parameter was replaced?       ``Average.live_tensors``, ``engines/binding.py``
How are DeepSpeed's masters read under ZeRO-3?                  ``engines/deepspeed/masters.py``, ``zero.py``
When does an offloaded update wait, and for what?               ``runtime/__init__.py``, ``shadow/host.py``
How does ``load()`` move elements from another world size?      ``core/files.py``, ``checkpoints/load.py``
How does the HF Trainer evaluate on the average?                ``integrations/transformers.py``
How is a merge kept within bounded memory?                      ``offline/merging/combine.py``
==============================================================  ===============================================

Every function takes the ``Average`` first. These files import ``average.py`` and not each other, except that
``update.py`` has ``files.py`` write snapshots, and ``batch_norm.py`` computes inside a visit.
"""

"""Averages on disk. What the files look like is in ``dist_ema/guide/checkpoints.md``.

======================  =========================================================================
``save``, ``contents``  writes a checkpoint on all ranks; what it will consist of
``load``, ``parts``     loads one on all ranks; what one rank reads of it
``export``              writes a Hugging Face directory on all ranks
``configuration``       configuration files of an export
``hub``                 names and configurations as transformers, diffusers and peft write them
``arrangement``         file tensors that are slices, joins or transposes of the module's tensors
``trace``               finds out such an arrangement
``folder``              full tensors that go into the files of one folder, in place or gathered
``layout``, ``dtypes``  safetensors files, laid out before they are written
``manifest``            ``ema.json``, made of ``stored`` (tensors) and ``state_json`` (clocks)
``strict_json``         JSON of unknown origin
``versions``            the checkpoint that is at a path now, read anew when a save replaces it
``reader``              elements of full tensors, out of the files that a manifest lists
``file_values``         full tensors that go from one file into another, in one process
``background``          a save that goes on while training does
``storage/``            the only modules that open these files, by backend
======================  =========================================================================
"""

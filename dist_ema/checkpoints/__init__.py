"""Writes averages to disk and reads them. What the files look like is in ``dist_ema/guide/checkpoints.md``.

====================  ===========================================================================
file                  subject
====================  ===========================================================================
``save``              writes a checkpoint on all ranks
``contents``          the folders, files and manifest of a checkpoint, before it is written
``folder``            the full tensors of one folder, written in place or gathered
``load``              loads a checkpoint on all ranks
``parts``             what one rank reads of it
``reader``            elements of full tensors, from the files that a manifest lists
``versions``          the checkpoint that is at a path now; reading again if a save replaces it
``export``            writes a Hugging Face directory on all ranks
``configuration``     the configuration files of an export
``model_card``        the README.md of an export or a merge
``hub``               names and configurations as transformers, diffusers and peft write them
``hub_tensors``       full tensors under these names, one after the other, for inference servers
``arrangement``       file tensors that are slices, joins or transposes of the module's tensors
``trace``             finds out such an arrangement
``file_values``       full tensors that one process copies from file to file
====================  ===========================================================================

The formats themselves (safetensors, ``ema.json``) are in :mod:`dist_ema.formats`. Files are opened only by
:mod:`dist_ema.storage`. The thread of a background save is in :mod:`dist_ema.runtime.background`.
"""

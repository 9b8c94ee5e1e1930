"""Weighted sums of checkpoints: of any kinds, in one pass over the bytes, into one or several new ones.

====================  ==================================================================================
``schemes``           which weights: a list, or a scheme by name
``sources``           checkpoints of four kinds as named tensors of which ranges can be read
``directories``       a model's part of a directory of torch.distributed.checkpoint, or a file of torch.save
``outputs``           a Hugging Face directory or a checkpoint in the making
``combine``           the pass: every range of every tensor from all sources into all outputs
``merge``             ``dist_ema.merge``
``snapshots``         saved averages with their profiles, and targets in words
``synthesize``        ``dist_ema.synthesize``
====================  ==================================================================================
"""

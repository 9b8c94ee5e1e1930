"""Weighted sums of checkpoints: of any kinds, in one pass over the bytes, into one or several new ones.

====================  ==================================================================================
``schemes``           which weights: a list, or a scheme by name
``sources``           checkpoints of four kinds as named tensors of which ranges can be read
``order``             which source is the oldest
``alike``             names that all sources have: a prefix taken off, tied tensors that some leave out
``meaning``           sums that would mean nothing
``outputs``           a Hugging Face directory or a checkpoint in the making
``combine``           the pass: every range of every tensor from all sources into all outputs
``merge``             ``dist_ema.merge``
``snapshots``         saved averages with their profiles, and targets in words
``synthesize``        ``dist_ema.synthesize``
====================  ==================================================================================
"""

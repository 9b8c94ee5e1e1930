"""Makes weighted sums of checkpoints of any kind, in one pass over the bytes, into one or several new ones.

====================  ==================================================================================
file                  subject
====================  ==================================================================================
``schemes``           which weights: a list, or a scheme by name
``sources``           checkpoints of four kinds as named tensors of which ranges can be read
``order``             which source is the oldest
``alike``             names that all sources have: removed prefixes, tied tensors that some leave out
``meaning``           refuses sums that mean nothing
``outputs``           writes a Hugging Face directory or a checkpoint
``combine``           the pass: every range of every tensor from all sources into all outputs
``merge``             ``dist_ema.merge``
``snapshots``         saved averages with their profiles, and targets in words
``synthesize``        ``dist_ema.synthesize``
====================  ==================================================================================
"""

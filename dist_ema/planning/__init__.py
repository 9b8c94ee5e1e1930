"""Predicts what averages will cost, before there is a run: ``dist-ema plan``.

====================  ======================================================================
file                  subject
====================  ======================================================================
``architecture``      the tensors of a model, from a config.json or a number of parameters
``families``          the same for common families, without transformers
``layouts``           what one rank of an imagined run would hold
``plan``              memory, bytes moved, time and files of an average
====================  ======================================================================
"""

"""Averages in ``torch.distributed.checkpoint``."""

"""Averages in checkpoints of ``torch.distributed.checkpoint`` (DCP)."""

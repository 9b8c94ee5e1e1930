"""Puts averages into checkpoints of ``torch.distributed.checkpoint`` (DCP), and takes them from there."""

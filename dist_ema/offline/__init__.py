"""Reads, verifies, compares and exports checkpoints in one process, without a model or a process group."""

"""What one process does with checkpoints, without a model or a process group: read, verify, compare, export."""

"""Signals, threads, CUDA streams and pinned memory: what runs beside the caller, and who waits for whom."""

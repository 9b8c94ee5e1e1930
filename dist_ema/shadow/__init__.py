"""The averaged values: flat memory on the device, or in host memory behind a thread.

Which work runs on which CUDA stream, and what it waits for: :mod:`dist_ema.runtime`.
"""

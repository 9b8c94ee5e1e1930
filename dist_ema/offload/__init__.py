"""Averages in host memory, which a thread keeps up to date."""

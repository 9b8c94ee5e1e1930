"""Arithmetic on plain local tensors: averages, fingerprints, rounding. Knows no process group and no wrapper."""

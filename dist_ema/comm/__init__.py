"""Communicates between ranks: collective calls, process groups, and full tensors from the parts of all ranks."""

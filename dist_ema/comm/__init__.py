"""What ranks say to each other: collective calls, process groups, and full tensors from the parts of all ranks."""

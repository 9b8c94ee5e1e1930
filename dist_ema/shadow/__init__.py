"""The averaged copy: on the device, or in host memory with a thread; and its visits to the model."""

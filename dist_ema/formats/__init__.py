"""Reads and writes file formats: safetensors, manifests, torch files, torch.distributed.checkpoint directories."""

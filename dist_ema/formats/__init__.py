"""What lies in files: safetensors, manifests, files of torch, directories of torch.distributed.checkpoint."""

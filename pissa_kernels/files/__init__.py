"""Files on disk: safetensors headers and single tensors, checkpoint folders, atomic and direct writes."""

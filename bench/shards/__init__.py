"""Weights that several processes hold in blocks: SVDs timed on CPUs, and predicted for GPUs."""

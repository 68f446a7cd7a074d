"""Initializing the layers of a model: one at a time, in batches, in shards, from quantized weights."""

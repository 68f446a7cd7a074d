"""Whole checkpoints on disk: decomposed tensor by tensor, resumed, verified and converted, never loaded as a model."""

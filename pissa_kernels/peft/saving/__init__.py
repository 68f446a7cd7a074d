"""Saving and loading adapters with their initial factors, and what a model was before it was trained.

In PEFT's files, in checkpoints of ``torch.distributed``, and from models in pieces.
"""

"""Merge: a checkpoint and the adapter that was trained on it, as one full checkpoint."""

"""Saving and loading adapters with their initial factors, and what a model was before it was trained."""

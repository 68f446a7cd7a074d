"""The seam to PEFT: the hook, the layers that are initialized under it, and what is saved and loaded with them."""

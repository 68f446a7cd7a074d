"""Trained PiSSA adapters on disk, turned into plain LoRAs of the original model one layer at a time."""

"""Conversion of trained PiSSA adapters on disk to plain LoRAs of the original model, one layer at a time."""

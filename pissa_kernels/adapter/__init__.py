"""What PEFT calls things: the keys of an adapter's file, the LoRA layers of a model, the patterns of its config."""

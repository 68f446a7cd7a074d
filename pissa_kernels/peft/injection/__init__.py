"""While PEFT injects adapters: what it may wrap, and the layers for which it does not call the initializer."""

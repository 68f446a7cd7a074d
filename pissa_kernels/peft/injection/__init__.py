"""While PEFT injects adapters: what it may wrap, and the layers for which it does not call the initializer.

Also what is undone if an injection fails, and processes that get their factors from the first one.
"""

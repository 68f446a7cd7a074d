"""The hook into PEFT: replacing its initializer, initializing layers under it, and saving and loading them."""

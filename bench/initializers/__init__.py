"""Benchmarks of single layers: ``pissa_init`` against PEFT's initializers and ``torch.svd_lowrank``."""

"""Benchmark of stacks of experts: one adapter for each expert of a fused layer, against loops of PEFT's initializer."""

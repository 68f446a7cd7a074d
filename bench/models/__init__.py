"""Benchmark of ``get_peft_model`` on whole models."""

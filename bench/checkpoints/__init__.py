"""Benchmark of ``pissa-kernels init`` on checkpoints on disk."""

"""Benchmarks of the verbs of :mod:`pissa_kernels.ops`, backend by backend."""

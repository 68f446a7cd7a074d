"""Benchmarks that gate on correctness before they time anything.

``python -m bench.run --suite init`` checks every initializer against a float64 reference, times the ones that pass,
measures their peak memory in fresh processes, and writes one JSON row for each case and provider to
``bench/results/``. ``python -m bench.table ROWS`` and ``python -m bench.plot ROWS PNG`` read nothing but those rows.

Run from the root of the repository, with the ``bench`` extra installed.
"""

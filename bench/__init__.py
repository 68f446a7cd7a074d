"""Benchmarks that check accuracy before they time anything.

``python -m bench --help`` lists them. Each compares every provider with a float64 reference, times the providers that
pass, measures their peak memory in fresh processes, and writes one JSON row per case and provider to ``bench/results``.
The tables and plots read nothing but those rows.

Run them from the root of the repository, with the ``bench`` extra installed.
"""

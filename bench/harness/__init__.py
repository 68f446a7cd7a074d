"""What all benchmarks share: options, the accuracy gate, timing, memory, rows on disk, the table.

Every benchmark takes the same steps: gate → time → memory → row. :mod:`.benchmark` has the loop, :mod:`.trial` the
steps.
"""

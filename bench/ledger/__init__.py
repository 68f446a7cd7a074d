"""A ledger of the GPU path, without a GPU: launches, waits, bytes, operations, and what a roofline predicts from them.

The real code runs on small stand-ins for weights on a GPU (:mod:`.standin`), a recorder counts what it does
(:mod:`.recorder`), and each count is evaluated for the shapes of a real model (:mod:`.events`, :mod:`.models`).
"""

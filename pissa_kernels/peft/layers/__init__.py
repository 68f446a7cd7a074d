"""Initializing the layers of a model: one at a time, in batches, in shards, from quantized weights.

:mod:`.initialize` checks a layer and makes a job of it (:mod:`.layer`); :mod:`.schedule` runs the jobs of a model.
"""

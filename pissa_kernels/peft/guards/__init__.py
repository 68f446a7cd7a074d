"""Operations on a model whose weights are residuals: done right, or refused before anything is changed.

Merging, unloading, weighted adapters, hotswaps, and what diffusers does by itself. :mod:`.guard` puts them around the
methods of a model.
"""

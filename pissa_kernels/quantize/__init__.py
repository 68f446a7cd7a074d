"""Quantized bases: formats, and the iteration that splits a weight into a 16-bit adapter and a quantized residual."""

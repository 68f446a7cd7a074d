"""Quantized residuals: times beside one ``pissa`` and beside full SVDs, and errors beside LoftQ's."""

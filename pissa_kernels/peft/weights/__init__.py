"""What the weight of a PEFT layer holds, W or a residual, and what the layer's forward pass adds to it.

:mod:`.record` is what a layer keeps of its initialization; :mod:`.state` and :mod:`.forward` compute with it. The
others know where a weight is: quantized, offloaded, shared with other modules, wrapped, divided by tensor parallelism.
"""

"""What the weight of a PEFT layer holds, W or a residual, and what the layer's forward pass adds to it."""

"""Training: the fused step, the optimiser, the loop and its work directory."""

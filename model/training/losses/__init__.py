"""The losses of AGQ training."""

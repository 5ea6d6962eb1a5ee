"""The network's arithmetic for float32 on a CPU."""

"""What others open: the volume, and shapes made from it, block by block."""

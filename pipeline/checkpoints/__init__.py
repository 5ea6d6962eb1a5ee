"""Checkpoints that are known by name, and how they are fetched."""

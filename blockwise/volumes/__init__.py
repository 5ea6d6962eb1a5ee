"""Volumes on disk: open, place in the world, create, mask."""

"""Volumes to run on: imported image files."""

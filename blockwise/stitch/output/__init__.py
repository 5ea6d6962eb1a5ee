"""Volumes that the stitch writes: segmentation and pyramid."""

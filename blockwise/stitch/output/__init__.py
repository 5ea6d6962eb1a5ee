"""Volumes that the stitch writes: segmentation, pyramid, exports."""

"""Where a segmentation is probably wrong, without any ground truth."""

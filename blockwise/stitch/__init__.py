"""The stitch: from fragments and evidence to one segmentation."""

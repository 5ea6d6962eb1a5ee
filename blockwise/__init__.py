"""Volumes cut into blocks: grid, ids, journal, prediction and stitching for any predictor."""

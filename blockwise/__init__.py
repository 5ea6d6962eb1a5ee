"""Volumes cut into blocks: grid, ids, journal, prediction and stitching for any predictor."""

if __name__ != "agq.blockwise":
    # From the root of the repository Python also finds the folder itself. Its modules would exist
    # twice, with two sets of classes.
    raise ImportError(f"import agq.blockwise, not {__name__}")

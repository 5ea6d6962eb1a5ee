"""The AGQ network: tensors and checkpoints; nothing of volumes on disk or clusters."""

if __name__ != "agq.model":
    # From the root of the repository Python also finds the folder itself. Its modules would exist
    # twice, with two sets of classes.
    raise ImportError(f"import agq.model, not {__name__}")

"""What a user runs: configuration, stages, command line. Composes ``blockwise`` and ``model``."""

if __name__ != "agq.pipeline":
    # From the root of the repository Python also finds the folder itself. Its modules would exist
    # twice, with two sets of classes.
    raise ImportError(f"import agq.pipeline, not {__name__}")

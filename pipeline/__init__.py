"""What a user runs: configuration, stages, command line. Composes ``blockwise`` and ``model``."""

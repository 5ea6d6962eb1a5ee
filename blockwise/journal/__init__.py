"""The truth about what is done: append-only lines in the run folder."""

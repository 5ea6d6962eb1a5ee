"""Whether what a run has written is still there: compare it with its records, take it back."""

"""Other methods on the same affinities."""

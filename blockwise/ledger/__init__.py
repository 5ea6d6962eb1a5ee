"""The journal's view in MongoDB."""

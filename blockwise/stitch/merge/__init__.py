"""Exact agglomeration of a contact graph."""

"""`agq export`: results in formats of other programs."""

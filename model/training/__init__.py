"""Training of the AGQ network: targets, matching, losses, data, loop."""

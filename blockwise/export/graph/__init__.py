"""The graph that a stitch decided on, for proofreading."""

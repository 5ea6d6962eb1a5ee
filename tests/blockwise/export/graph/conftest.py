"""The cluster that tests of the graph share."""

from tests.helpers.stitch_runs import client

__all__ = ["client"]

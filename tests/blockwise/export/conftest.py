"""The cluster that tests of exports share."""

from tests.helpers.stitch_runs import client

__all__ = ["client"]

"""The run and the cluster that checks of a stitched folder share."""

from tests.helpers.stitch_runs import client, run

__all__ = ["client", "run"]

"""The cluster that tests of meshes share."""

from tests.helpers.stitch_runs import client

__all__ = ["client"]

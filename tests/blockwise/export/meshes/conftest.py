"""The cluster and the bucket that tests of meshes share."""

from tests.helpers.buckets import s3
from tests.helpers.stitch_runs import client

__all__ = ["client", "s3"]

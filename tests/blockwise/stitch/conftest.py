"""The run, the cluster and the result that tests of the stitch share."""

from tests.helpers.stitch_runs import client, run, run_dir, undisturbed

__all__ = ["client", "run", "run_dir", "undisturbed"]

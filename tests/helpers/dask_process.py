"""Hold a dask cluster of two workers, so that a test can kill its scheduler. Prints the address."""

import time

from tests.helpers.stitch_runs import open_cluster


def main() -> None:
    with open_cluster(2, processes=True) as cluster:
        print(cluster.scheduler_address, flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()

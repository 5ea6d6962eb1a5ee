"""Hold a dask cluster of two workers, so that a test can kill its scheduler. Prints the address."""

import time

from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.settings import DaskSettings


def main() -> None:
    with dask_client(DaskSettings(workers=2)) as client:
        print(client.scheduler.address, flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()

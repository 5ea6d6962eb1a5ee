"""Hold a dask cluster of two workers, so that a test can kill its scheduler. Prints the address."""

import time

from agq.blockwise.stitch.cluster import local_client


def main() -> None:
    with local_client(workers=2) as client:
        print(client.scheduler.address, flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()

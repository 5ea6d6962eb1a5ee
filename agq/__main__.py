"""`python -m agq` is `agq`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Python has put the current folder first: a user's model.py or yaml.py there is not ours.
        del sys.path[0]

    from agq.pipeline.cli.main import main

    main()

"""`python -m agq` is `agq`."""

from agq.pipeline.cli.main import main

main()

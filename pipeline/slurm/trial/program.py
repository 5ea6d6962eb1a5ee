"""The program of the job that times one block, for `agq plan --submit`."""

import json
import logging
import os
import sys
from pathlib import Path

from agq.blockwise.predict.block_threads import BlockError
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.storage.files import write_atomic
from agq.credentials import log_to_stderr
from agq.errors import InputError
from agq.owners import require_own
from agq.pipeline.forecast.measure import measure
from agq.pipeline.slurm.scripts import trial_folder
from agq.reading import read_record

_logger = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Time the block that ``request.json`` names; write ``JOB.json`` beside it."""
    log_to_stderr()
    folder = trial_folder(Path(arguments[0]))
    try:
        request = read_record(folder / "request.json", check=require_own)
        spec = PredictSpec.load(folder, to_run=True)
        timing = measure(spec, int(request["block"]), str(request["key"]))
    except (InputError, BlockError) as error:
        _logger.error("%s", " ".join(str(error).split()))
        return 1
    said = json.dumps(timing.model_dump())
    write_atomic(folder / f"{os.environ['SLURM_JOB_ID']}.json", said.encode(), mode=0o644)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

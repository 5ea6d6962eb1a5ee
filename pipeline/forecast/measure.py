"""Compute one block as a worker would, and see what that takes."""

import resource
import tempfile
import time
from pathlib import Path

from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.journal.records import this_worker
from agq.blockwise.predict.block_threads import BlockFiles
from agq.blockwise.predict.predictor import gpu_of, load_predictor
from agq.blockwise.predict.spec import PredictSpec
from agq.pipeline.forecast.timing import Timing

_BATCH_S = 20.0


def measure(spec: PredictSpec, number: int, key: str) -> Timing:
    """Compute and write a block twice, the second time for the clock, in a temporary folder.

    Workers read, compute and write at the same time, so the longest of the three counts.

    Parameters
    ----------
    spec
        The prediction; nothing is written into its run folder.
    number
        The block.
    key
        `Timing.key` of the result.

    Raises
    ------
    InputError, BlockError
        If the block cannot be read, computed or written; a predictor raises what it likes.
    """
    began = time.perf_counter()
    predictor = load_predictor(spec.factory, spec.options, 0, spec.files)
    loaded = time.perf_counter()
    grid = spec.block_grid()
    with tempfile.TemporaryDirectory(prefix="agq-plan-") as name:
        folder = Path(name)
        BlockWriter.create(folder, grid, spec.raw["unit"], affinities=spec.affinities)
        files = BlockFiles.open(spec, folder)
        opened = time.perf_counter()
        block, tissue = files.read(number), files.tissue(number)
        read_s = time.perf_counter() - opened
        # The first one pays for compilation, allocation and the choice of algorithms.
        (prediction,) = predictor.predict([block])
        batch = predictor.batch_size
        if (time.perf_counter() - opened - read_s) * batch > _BATCH_S:
            batch = 1
        files.write(number, prediction, tissue)
        warm = time.perf_counter()
        predictor.predict([block] * batch)
        compute_s = (time.perf_counter() - warm) / batch
        written = time.perf_counter()
        files.write(number, prediction, tissue)
        write_s = time.perf_counter() - written
        names = ("fragments", "sidecars", "affinities")
        sizes = [path.stat().st_size for path in files.writer.files(number)]
    device = str(getattr(predictor, "device", spec.options.get("device", "cpu")))
    return Timing(
        key=key,
        seconds=max(compute_s, read_s, write_s),
        load_s=loaded - began,
        worker_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device=gpu_of(device).get("gpu", device),
        host=this_worker().host,
        time=time.time(),
        file_bytes=dict(zip(names, sizes, strict=False)),
    )

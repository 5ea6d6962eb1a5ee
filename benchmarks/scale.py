"""What runs of 10^12 to 10^15 voxels take, from measured rates: the tables of docs/scale.md.

    python benchmarks/scale.py

Prints them as Markdown; `agq plan` gives the same figures for a volume of yours.
"""

import math

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.storage.files import format_bytes
from agq.pipeline.forecast.forecast import Forecast, Means, Work, forecast, gpu_seconds
from agq.pipeline.forecast.scale import DENSITIES, Density, Scale, scale
from agq.pipeline.status.text import duration

WRITE = (16, 256, 256)
"""Voxels of a block; one section and one row of voxels more are read."""

GRIDS = {"10^12": (50, 100, 200), "10^13": (100, 250, 400), "10^15": (500, 1000, 2000)}
"""Blocks of volumes of so many voxels, within 5 %."""

NODES, GPUS, CORES = 100, 4, 32
"""Of a cluster, and of each of its nodes."""


def runs(shape: tuple[int, int, int]) -> tuple[Forecast, dict[Density, Scale]]:
    """Return what a run of so many blocks takes."""
    volume = tuple(n * w for n, w in zip(shape, WRITE, strict=True))
    grid = BlockGrid(volume, (30, 6, 6), WRITE, (0, 0, 0), (1, 1, 1), (0, 0, 0))
    blocks = math.prod(shape)
    means = Means(NODES * GPUS, gpus=True, cores=NODES * CORES)
    expected = forecast(
        Work(grid, blocks, blocks, blocks), means, None, assumed_s=gpu_seconds(grid)
    )
    return expected, {density: scale(grid, blocks, blocks, density) for density in DENSITIES}


def rows() -> list[tuple[str, ...]]:
    """Return the table: a row for each quantity, a column for each volume."""
    found = [runs(shape) for shape in GRIDS.values()]

    def row(name: str, value: object) -> tuple[str, ...]:
        return (name, *(value(*one) for one in found))  # type: ignore[operator]

    def single(name: str, value: object) -> list[tuple[str, ...]]:
        return [
            row(f"{name}, {density.name}", lambda _, s, d=density: value(s[d]))  # type: ignore[operator]
            for density in DENSITIES
        ]

    dense = DENSITIES[1]
    return [
        ("voxels", *GRIDS),
        row("blocks", lambda f, _: f"{f.blocks:,}"),
        row("files before packing", lambda _, s: f"{s[dense].files_peak:,}"),
        row("files at the end", lambda f, _: f"{sum(f.files.values()):,}"),
        row("of these, with fragments packed", lambda f, _: f"{packed(f):,}"),
        *(
            row(f"disk: {name}", lambda f, _, n=name: format_bytes(f.disk_bytes[n]))
            for name in found[0][0].disk_bytes
        ),
        row("database", lambda _, s: format_bytes(s[dense].ledger_bytes)),
        row("memory: coordinator", lambda _, s: format_bytes(s[dense].coordinator_bytes)),
        row("memory: stitch", lambda _, s: format_bytes(s[dense].client_bytes)),
        row("leaves of the stitch", lambda _, s: f"{s[dense].leaves:,}"),
        row("blocks of a leaf", lambda _, s: f"{s[dense].leaf_blocks:,}"),
        *single("edges of the last merge", lambda s: f"{s.root_edges:.1e}"),
        *single("memory: last merge", lambda s: format_bytes(s.root_bytes)),
        *single("time: last merge", lambda s: duration(s.root_s)),
        row("time: before the first block", lambda _, s: duration(s[dense].first_block_s)),
        *(
            row(f"time: {name}", lambda f, _, n=name: duration(f.seconds[n]))
            for name in found[0][0].seconds
        ),
    ]


def packed(expected: Forecast) -> int:
    """Return the files that are left after `agq pack`."""
    return (
        sum(expected.files.values()) - expected.files["fragments"] + expected.files["segmentation"]
    )


def table() -> str:
    """Return the table in Markdown."""
    head, *body = rows()
    lines = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Print the table, and what breaks first."""
    print(table())
    for name, shape in GRIDS.items():
        for density, found in runs(shape)[1].items():
            for limit in found.limits():
                print(f"{name}, {density.name}: {limit}")


if __name__ == "__main__":
    main()

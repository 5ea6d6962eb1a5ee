"""Print how long the stitch takes and what memory it needs, as tables.

``python benchmarks/stitch/tables.py [--edges 1e7 1e8] [--blocks 8 8 8] [--memory] [--waterz]``

``--edges``: agglomeration alone, of contact graphs made without voxels, on one core, superblock by
superblock, files included. ``--blocks``: the whole stitch of a volume of so many blocks of
16 x 256 x 256 uint64 fragments; the yardstick is a plain zarr copy of the same fragments with the
same codec and workers, all warmed up (the copy syncs nothing and keeps no journal). ``--memory``:
peak memory at 67, 537 and 2,147 Mvoxel. ``--client``: memory of the process that runs the stitch of
a cube of about so many blocks, and the bytes of its tasks, without voxels. ``--waterz``: against
waterz.agglomerate over the whole of a volume of 100 x 1024 x 1024 voxels.
"""

import argparse
import os
import tempfile
from pathlib import Path

from client import client
from graphs import graphs
from volumes import memory, print_sidecar, volume

SIZES = ((4, 4, 4), (8, 8, 8), (8, 16, 16))
"""Blocks of the volumes whose memory is measured."""


def main() -> None:
    # Workers look only in folders that are named: what they copy with is in this one.
    named = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *([named] if named else [])]
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edges", type=float, nargs="*", default=[], help="sizes of graphs")
    parser.add_argument(
        "--weak",
        type=int,
        default=370,
        help="highest affinity, in 1/510, of neighbours that should stay apart; a larger one makes"
        " graphs with more positive edges",
    )
    parser.add_argument("--leaf", type=int, nargs=3, default=[8, 8, 8], help="blocks of a leaf")
    parser.add_argument("--blocks", type=int, nargs=3, help="blocks of the volume")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--client", type=float, nargs="*", default=[], help="numbers of blocks")
    parser.add_argument("--waterz", action="store_true")
    parser.add_argument("--workers", type=int, help="default: one a core")
    parser.add_argument("--folder", type=Path, help="where files go (default: temporary)")
    arguments = parser.parse_args()
    if arguments.edges:
        graphs(
            [int(n) for n in arguments.edges],
            arguments.weak,
            arguments.folder,
            arguments.leaf,
        )
    if arguments.blocks:
        print_sidecar()
        with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
            volume(arguments.blocks, arguments.workers, Path(made))
    if arguments.memory:
        memory(SIZES, arguments.workers, arguments.folder)
    if arguments.client:
        client([int(n) for n in arguments.client], arguments.leaf, arguments.folder)
    if arguments.waterz:
        from against_waterz import CELLS, against_waterz

        for size in CELLS:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
                against_waterz(size, arguments.workers, Path(made))


if __name__ == "__main__":
    main()

"""The group `agq export`."""

import typer

from agq.pipeline.cli.lazy import lazy_group

#: In the order of the help.
COMMANDS = {
    "precomputed": "agq.pipeline.cli.export.precomputed:precomputed",
    "graph": "agq.pipeline.cli.export.graph:graph",
    "tiff": "agq.pipeline.cli.export.files:tiff",
    "h5": "agq.pipeline.cli.export.files:hdf5",
    "zarr": "agq.pipeline.cli.export.files:ome_zarr",
}

export_app = typer.Typer(
    cls=lazy_group(COMMANDS),
    no_args_is_help=True,
    help="Write results in formats of other programs.",
)

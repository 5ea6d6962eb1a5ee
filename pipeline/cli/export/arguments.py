"""Arguments that several `agq export` commands take, and how they write numbers."""

from typing import Annotated, Any

import typer

Source = Annotated[
    str,
    typer.Argument(help="Run folder, path or path::dataset.", show_default=False),
]
VoxelSize = Annotated[
    str | None, typer.Option(help="z,y,x, if the array does not say.", show_default=False)
]
Unit = Annotated[
    str | None,
    typer.Option(
        help="World unit: nm, angstrom or pm; default: the first that is exact.",
        show_default=False,
    ),
]


def by(values: Any) -> str:
    """Return numbers as ``3 x 4 x 5``."""
    from agq.blockwise.export.volume import number  # brings dask with it

    return " x ".join(number(v) for v in values)

"""Arguments and options that several commands have, with one help for all."""

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[
    Path, typer.Argument(help="Run folder or YAML configuration file.", show_default=False)
]
RunDir = Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

"""The command line: `agq COMMAND`. Every command is imported when it is asked for."""

import errno
import os
import sys
from typing import Annotated, Final

import typer

from blockwise.errors import InputError, RunStoppedError
from model.errors import ModelInputError
from pipeline.lazy_commands import lazy_group

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

#: In the order of the help.
COMMANDS: Final = {
    "run": "pipeline.run_cli:run",
    "predict": "pipeline.run_cli:predict",
    "stitch": "pipeline.stitch_cli:stitch",
    "plan": "pipeline.run_cli:plan",
    "status": "pipeline.watch_cli:status",
    "watch": "pipeline.watch_cli:watch",
    "metrics": "pipeline.watch_cli:metrics",
    "view": "pipeline.look_cli:view",
    "dashboard": "pipeline.look_cli:dashboard",
    "snapshot": "pipeline.look_cli:snapshot",
    "report": "pipeline.look_cli:report",
    "evaluate": "pipeline.score_cli:evaluate",
    "skeletons": "pipeline.score_cli:skeletons",
    "sweep": "pipeline.score_cli:sweep",
    "baseline": "pipeline.score_cli:baseline_app",
    "submit": "pipeline.slurm.commands:submit",
    "attach": "pipeline.slurm.commands:attach",
    "scale": "pipeline.slurm.commands:scale",
    "cancel": "pipeline.slurm.commands:cancel",
    "resume": "pipeline.slurm.commands:resume",
    "logs": "pipeline.slurm.commands:logs",
    "import": "pipeline.run_cli:import_",
    "synthetic": "pipeline.run_cli:synthetic",
    "train": "pipeline.train_cli:train",
    "checkpoint": "pipeline.train_cli:checkpoint_app",
    "export": "pipeline.export_cli:export_app",
    "ledger": "pipeline.watch_cli:ledger_app",
    "config": "pipeline.run_cli:config_app",
}

app = typer.Typer(
    cls=lazy_group(COMMANDS),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Segment neurons in large EM volumes: predict blocks, stitch them, watch and evaluate.",
)
_shown = {"tracebacks": False}


@app.callback()
def _main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks instead of one-line errors.")
    ] = False,
) -> None:
    _shown["tracebacks"] = debug


def main() -> None:
    """Run the command line; wrong input becomes one line and exit code 2."""
    try:
        app()
    except BrokenPipeError:
        # A reader that has seen enough (agq status | head). The interpreter must not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, ModelInputError) as error:
        _fail(error, EXIT_BAD_INPUT)
    except RunStoppedError as error:
        _fail(error, EXIT_FAILED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = OSError(f"{error}: free some space, then the same command goes on")
        _fail(error, EXIT_BAD_INPUT)


def _fail(error: Exception, code: int) -> None:
    if _shown["tracebacks"]:
        raise error
    typer.echo(f"agq: {' '.join(str(error).split())}", err=True)
    sys.exit(code)

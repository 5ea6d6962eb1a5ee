"""The command line: `agq COMMAND`. Every command is imported when it is asked for."""

import atexit
import gc
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, TextIO

import typer

from agq import waiting
from agq.credentials import HidingFormatter, hide, hide_address, hide_uncaught, visible_secret
from agq.errors import InputError, RunStoppedError, machine_fault
from agq.pipeline.cli.lazy import lazy_group
from agq.plain_text import say

_logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

# typer has its own copy of click, and says of these errors only that of a wrong value.
_UsageError: Final[type[Exception]] = typer.BadParameter.__bases__[0]

# A whole argument, or the value of an option, with a dataset after it perhaps.
_VARIABLE: Final = re.compile(r"^(--[\w-]+=)?\$\{(\w+)\}(?=::|$)")

#: In the order of the help.
COMMANDS: Final = {
    "run": "agq.pipeline.cli.run:run",
    "predict": "agq.pipeline.cli.run:predict",
    "worker": "agq.pipeline.cli.run:worker",
    "stitch": "agq.pipeline.cli.stitch:stitch",
    "plan": "agq.pipeline.cli.run:plan",
    "verify": "agq.pipeline.cli.verify:verify",
    "pack": "agq.pipeline.cli.verify:pack",
    "status": "agq.pipeline.cli.watch:status",
    "watch": "agq.pipeline.cli.watch:watch",
    "metrics": "agq.pipeline.cli.watch:metrics",
    "notify": "agq.pipeline.cli.watch:notify",
    "view": "agq.pipeline.cli.look:view",
    "dashboard": "agq.pipeline.cli.look:dashboard",
    "snapshot": "agq.pipeline.cli.look:snapshot",
    "report": "agq.pipeline.cli.look:report",
    "evaluate": "agq.pipeline.cli.score.score:evaluate",
    "skeletons": "agq.pipeline.cli.score.score:skeletons",
    "sweep": "agq.pipeline.cli.score.score:sweep",
    "calibrate": "agq.pipeline.cli.score.calibrate:calibrate",
    "suspects": "agq.pipeline.cli.score.suspects:suspects",
    "baseline": "agq.pipeline.cli.score.score:baseline_app",
    "submit": "agq.pipeline.cli.slurm:submit",
    "attach": "agq.pipeline.cli.slurm:attach",
    "scale": "agq.pipeline.cli.slurm:scale",
    "cancel": "agq.pipeline.cli.slurm:cancel",
    "resume": "agq.pipeline.cli.slurm:resume",
    "logs": "agq.pipeline.cli.slurm:logs",
    "import": "agq.pipeline.cli.run:import_",
    "synthetic": "agq.pipeline.cli.run:synthetic",
    "train": "agq.pipeline.cli.train:train",
    "checkpoint": "agq.pipeline.cli.train:checkpoint_app",
    "export": "agq.pipeline.cli.export.app:export_app",
    "ledger": "agq.pipeline.cli.watch:ledger_app",
    "config": "agq.pipeline.cli.config:config_app",
}

app = typer.Typer(
    cls=lazy_group(COMMANDS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Segment neurons in large EM volumes: predict blocks, stitch them, watch and evaluate.",
)
_shown = {"tracebacks": False}


def _print_version(asked: bool) -> None:
    if asked:
        import agq

        say(f"agq {agq.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks instead of one-line errors.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    _shown["tracebacks"] = debug


def main() -> None:
    """Run the command line; wrong input becomes one line and exit code 2."""
    # At the end Python would look through all that the libraries have made for garbage, which takes
    # a fifth of the time of a small run.
    atexit.register(gc.freeze)
    # Names of files may be in no encoding at all, and a terminal's may lack what we print.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(HidingFormatter())
    try:
        with _quiet_warnings(), waiting.switched_on():
            waiting.doing("loading libraries")
            code = app(_arguments(sys.argv[1:]), prog_name="agq", standalone_mode=False)
        sys.exit(code or 0)
    except typer.Abort:
        sys.exit(EXIT_FAILED)
    except _UsageError as error:
        _explain_usage(error)
    except BrokenPipeError:
        # A reader that has seen enough (agq status | head). The interpreter must not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        _fail(error, EXIT_BAD_INPUT)
    except RunStoppedError as error:
        _fail(error, EXIT_FAILED)
    except MemoryError as error:
        _fail(error, EXIT_FAILED, f"there is not enough memory ({error or 'none is left'})")
    except OSError as error:
        line = machine_fault(error)
        if line is None:
            raise
        _fail(error, EXIT_BAD_INPUT, line)
    finally:
        # typer has a hook of its own while a command runs.
        hide_uncaught()


@contextmanager
def _quiet_warnings() -> Iterator[None]:
    """Let warnings of libraries go to the log; they are for developers (`--debug` prints them)."""

    def log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
        if _shown["tracebacks"]:
            say(hide(text), err=True)
        else:
            _logger.info("%s", text)

    with warnings.catch_warnings():
        warnings.showwarning = log
        yield


def _explain_usage(error: Any) -> None:
    """Say in one line what is wrong with a command line; without a command, its help is shown."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help
        sys.exit(EXIT_BAD_INPUT)
    words = context.command_path.removeprefix("agq").strip() if context else ""
    command = f"agq {words}".strip()
    text = f"{words}: " * bool(words) + error.format_message().rstrip(".")
    _fail(InputError(text), EXIT_BAD_INPUT, hint=f"{command} --help")


def _arguments(words: list[str]) -> list[str]:
    """Return a command line in which ``${NAME}``, where a path may be, stands for its variable.

    Raises
    ------
    InputError
        If an address in it has a secret, which other users of the machine could read.
    """
    for word in words:
        option, equals, value = word.partition("=")
        what = option if equals and option.startswith("--") else ""
        if option != "--set" and (way := visible_secret(value if what else word)):
            raise InputError(f"{what or hide_address(word)}: {way}")
    return [
        _VARIABLE.sub(lambda match: f"{match[1]}{os.environ.get(match[2], match[0])}", word)
        for word in words
    ]


def _fail(error: Exception, code: int, line: str | None = None, hint: str | None = None) -> None:
    if _shown["tracebacks"]:
        raise error
    more = f" (see {hint})" if hint else ""
    say(f"agq: {hide(' '.join((line or str(error)).split()))}{more}", err=True)
    sys.exit(code)

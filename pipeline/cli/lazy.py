"""A command line whose commands are imported when they are asked for.

All of `agq` takes most of a second to import, and `agq status` is asked often. The list of commands
(`agq --help`) is read from their source.
"""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from importlib.abc import SourceLoader
from pathlib import Path
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group
from typer.models import OptionInfo

from agq.paths import require_local


def lazy_group(places: Mapping[str, str]) -> type[TyperGroup]:
    """Return the class (``typer.Typer(cls=...)``) of a group of commands.

    Each is made when it is looked up. A place is ``module:attribute``: a function, or a
    `typer.Typer` with commands of its own. Their order is that of the help.
    """

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            names = {name: TyperCommand(name) for name in places}
            super().__init__(**attributes | {"commands": names})
            self._listing = False

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if self._listing or cmd_name not in places:
                return self.commands.get(cmd_name)
            return _make(cmd_name, places[cmd_name])

        def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
            # The shell shows names, and waits: no command is imported for its help.
            with self._names_only():
                return super().shell_complete(ctx, incomplete)

        def format_help(self, ctx: Any, formatter: Any) -> None:
            for name, place in places.items():
                self.commands[name].help = _help(place)
            with self._names_only():
                super().format_help(ctx, formatter)

        @contextmanager
        def _names_only(self) -> Iterator[None]:
            self._listing = True
            try:
                yield
            finally:
                self._listing = False

    return LazyGroup


def _help(place: str) -> str:
    """Return the help of a command: a function's docstring, or what its `typer.Typer` is given."""
    name, _, attribute = place.partition(":")
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert isinstance(spec.loader, SourceLoader)
    for node in ast.parse(spec.loader.get_source(name) or "").body:
        match node:
            case ast.FunctionDef(name=found) if found == attribute:
                return ast.get_docstring(node) or ""
            case ast.Assign(targets=[ast.Name(id=found)], value=ast.Call(keywords=given)):
                if found == attribute:
                    texts = [ast.literal_eval(word.value) for word in given if word.arg == "help"]
                    return inspect.cleandoc(texts[0])
    raise LookupError(place)


@cache
def _make(name: str, place: str) -> Any:
    module, _, attribute = place.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        for registered in found.registered_commands:
            if registered.callback is not None:
                registered.callback = _with_local_paths(registered.callback)
        command: Any = get_group(found)
        command.name = name
        return command
    single = typer.Typer(add_completion=False)
    single.command(name)(_with_local_paths(found))
    return get_command(single)


def _with_local_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that takes no address where it names a path: it would make a folder ``s3:``.

    What may be an address is a text among its arguments.
    """

    @wraps(command)
    def checked(**given: Any) -> Any:
        for name, value in given.items():
            if isinstance(value, Path):
                hints = get_type_hints(command, include_extras=True)[name].__metadata__
                is_option = any(isinstance(hint, OptionInfo) for hint in hints)
                require_local(value, f"--{name.replace('_', '-')}" if is_option else name.upper())
        return command(**given)

    return checked

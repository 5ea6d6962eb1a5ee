"""A command line whose commands are imported when they are asked for.

All of `agq` takes most of a second to import, and `agq status` is asked often.
"""

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group


def lazy_group(places: Mapping[str, str]) -> type[TyperGroup]:
    """Return the class (``typer.Typer(cls=...)``) of a group of commands.

    Each is made when it is looked up. A place is ``module:attribute``: a function, or a
    `typer.Typer` with commands of its own. Their order is that of the help.
    """

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            names = {name: TyperCommand(name) for name in places}
            super().__init__(**attributes | {"commands": names})
            self._completing = False

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if self._completing or cmd_name not in places:
                return self.commands.get(cmd_name)
            return _make(cmd_name, places[cmd_name])

        def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
            # The shell shows names, and waits: no command is imported for its help.
            self._completing = True
            try:
                return super().shell_complete(ctx, incomplete)
            finally:
                self._completing = False

    return LazyGroup


@cache
def _make(name: str, place: str) -> Any:
    module, _, attribute = place.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        command: Any = get_group(found)
        command.name = name
        return command
    single = typer.Typer(add_completion=False)
    single.command(name)(found)
    return get_command(single)

"""A command line whose commands are imported when they are asked for.

All of `agq` takes most of a second to import, and `agq status` is asked often.
"""

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group


class LazyCommands(MutableMapping[str, Any]):
    """Commands by name, each made when it is looked up.

    Parameters
    ----------
    places : mapping of str to str
        Where each command is: ``module:attribute``, a function or a `typer.Typer` with commands of
        its own. The order is that of the help.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _make(name, self._places[name])
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._places.setdefault(name, "")
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._places[name]
        self._made.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def lazy_group(places: Mapping[str, str]) -> type[TyperGroup]:
    """Return the class (``typer.Typer(cls=...)``) of a group of such commands."""

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes | {"commands": LazyCommands(places)})

        def list_commands(self, ctx: Any) -> list[str]:
            return list(self.commands)

        def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
            # The shell shows names, and waits: no command is imported for its help.
            lazy = self.commands
            self.commands = {name: TyperCommand(name) for name in lazy}
            try:
                return super().shell_complete(ctx, incomplete)
            finally:
                self.commands = lazy

    return LazyGroup


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

"""An address where a local path belongs is one line, for every command and field there is."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from pydantic import BaseModel

from agq.errors import InputError
from agq.model.training.config import TrainConfig
from agq.pipeline.cli import lazy
from agq.pipeline.cli.export.app import COMMANDS as EXPORTS
from agq.pipeline.cli.main import COMMANDS
from agq.pipeline.config.schema import Config, parse_config


def path_arguments() -> list[Any]:
    """Return every argument of every command that is a path."""
    found = []
    for name, place in {**COMMANDS, **{f"export {k}": v for k, v in EXPORTS.items()}}.items():
        module, _, attribute = place.partition(":")
        command = getattr(lazy.importlib.import_module(module), attribute)
        if isinstance(command, typer.Typer):
            lazy._make(name, place)
            parts = [c.callback for c in command.registered_commands]
        else:
            parts = [lazy._with_local_paths(command)]
        found += [
            pytest.param(part, argument, id=f"{name}-{part.__name__}-{argument}")
            for part in parts
            for argument, hint in get_type_hints(part).items()
            if hint is Path or Path in get_args(hint)
        ]
    return found


@pytest.mark.parametrize(("command", "argument"), path_arguments())
def test_arguments(command, argument):
    with pytest.raises(InputError, match=r"s3:/b/x is an address of s3, and this must be a local"):
        command(**{argument: Path("s3://b/x")})


def test_there_are_many_and_the_line_names_them(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(path_arguments()) > 30
    for arguments, name in (
        (("export", "zarr", "in.zarr", "gs://b/x"), "OUT: gs"),
        (("stitch", "in", "--output", "s3://b/x"), "--output: s3"),
    ):
        code, _, err = main(*arguments)
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"agq: {name}:/b/x is an address" in err
    assert not list(tmp_path.iterdir())


def fields(model: type[BaseModel], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the fields that are paths, of a model and of those in it."""
    found = []
    for name, field in model.model_fields.items():
        inner = [field.annotation, *get_args(field.annotation)]
        found += [(*above, name)] if Path in inner else []
        for part in inner:
            if isinstance(part, type) and issubclass(part, BaseModel):
                found += fields(part, (*above, name))
    return found


@pytest.mark.parametrize(
    ("model", "path"),
    [(m, p) for m in (Config, TrainConfig) for p in fields(m)],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else value.__name__,
)
def test_fields(model, path):
    part = model
    for name in path[:-1]:
        annotation = part.model_fields[name].annotation
        part = next(a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields"))
    values = part.model_construct(**dict.fromkeys(part.model_fields))
    object.__setattr__(values, path[-1], Path("s3://b/x"))
    with pytest.raises(ValueError, match=f"{path[-1]}: s3:/b/x is an address"):
        values._writes_no_address()


def test_run_dir():
    values = {"run_dir": "s3://b/run", "input": {"raw": {"path": "x.zarr"}}}
    with pytest.raises(InputError, match=r"run_dir.*s3://b/run is an address of s3"):
        parse_config(values)

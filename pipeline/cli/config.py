"""Commands about configurations: `agq config init`, `check`, `explain` and `schema`."""

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import ConfigFile, Settings
from agq.plain_text import say

if TYPE_CHECKING:
    from agq.pipeline.config.explain import Setting

config_app = typer.Typer(
    no_args_is_help=True, help="Start a configuration, check one, or explain its settings."
)

_NEXT: Final = {
    "local": "set input.raw and run_dir in it, then: agq plan {file}",
    "slurm": "set input.raw, run_dir and slurm in it, then: agq submit {file} --dry-run",
    "demo": (
        "agq synthetic runs/demo-input.zarr --shape 40,768,768 --seed 7, then: agq run {file}"
    ),
}
"""What to do with each template."""


@config_app.command("init")
def init(
    template: Annotated[
        Literal["local", "slurm", "demo"],
        typer.Argument(help="For one machine, for a SLURM cluster, or the demo of `make demo`."),
    ] = "local",
    output: Annotated[
        Path, typer.Option("--output", "-o", readable=False, help="YAML file to write.")
    ] = Path("my.yaml"),
) -> None:
    """Write a configuration to start from, every setting explained."""
    text = (files("agq") / "configs" / f"{template}.yaml").read_text(encoding="utf-8")
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{output} exists; name another file with -o") from None
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from None
    say(f"wrote {output}; next: {_NEXT[template].format(file=output)}")


@config_app.command("check")
def check(config: ConfigFile, settings: Settings = None) -> None:
    """Check names and values of a configuration (`agq plan` also opens the files)."""
    from agq.pipeline.config.schema import load_config

    notify = load_config(config, settings).notify
    if notify is not None:
        notify.address()
    say(f"{config}: ok")


@config_app.command("explain")
def explain(
    key: Annotated[
        str | None,
        typer.Argument(
            help="A setting or a section: stitch.across, or its last part; default: all sections.",
            show_default=False,
        ),
    ] = None,
    training: Annotated[
        bool, typer.Option("--train", help="Settings of agq train instead of those of agq run.")
    ] = False,
) -> None:
    """Say what a setting means, its type, what it may be, and its default."""
    from agq.pipeline.config.explain import find, settings_of

    if training:
        from agq.model.training.config import TrainConfig

        whole = settings_of(TrainConfig)
    else:
        from agq.pipeline.config.schema import Config

        whole = settings_of(Config)
    for number, setting in enumerate([whole] if key is None else find(whole, key)):
        if number:
            say()
        _show(setting)


def _show(setting: "Setting") -> None:
    from agq.terminal import WholeTable, console, wrapped

    if setting.key:
        say(f"{setting.key}: {setting.kind.replace('`', '')}; default: {setting.default}")
    if setting.meaning:
        say(wrapped(setting.meaning))
    if setting.fields:
        table = WholeTable("", ("setting", "default", "meaning"))
        for field in setting.fields:
            table.add_row(field.name, field.default, field.meaning)
        console().print(table)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of the configuration, every field described."""
    from agq.pipeline.config.schema import Config

    say(json.dumps(Config.model_json_schema(), indent=2))

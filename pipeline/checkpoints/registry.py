"""The checkpoints that are known by name: those of the package, and those of a lab's own registry.

A registry is a YAML file. Beside the one of the package (``model/weights/registry.yaml``), the
variable ``AGQ_REGISTRY`` names one of the lab, a file or an address; of equal names, the lab's
counts. A folder with a registry and the files that it names is a mirror: addresses without a scheme
are relative to it.
"""

import os
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit, urlunsplit

import yaml
from pydantic import Field, StringConstraints, model_validator

from agq import model
from agq.blockwise.volumes.location import SCHEMES, RemoteLocation, locate
from agq.credentials import hide_address
from agq.errors import InputError
from agq.model.recommended import Line
from agq.paths import expanded
from agq.pipeline.config.yaml_settings import parse_values, parse_yaml
from agq.reading import DOCUMENT_BYTES, read_file
from agq.settings import Settings

VARIABLE = "AGQ_REGISTRY"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", to_lower=True)]


class Entry(Settings):
    """One checkpoint."""

    name: Name
    """What `model.checkpoint` and `agq checkpoint fetch` call it."""

    file: str | None = None
    """A file of the package."""

    url: str | None = None
    """Address or file that it is fetched from."""

    sha256: Sha256 | None = None
    """Of what lies there."""

    licence: Line | None = None
    """Of the weights."""

    voxel_size: tuple[float, float, float] | None = None
    """Nanometres (z, y, x) of the data it was trained on."""

    tissue: Line | None = None
    """What it was trained on."""

    scores: list[Line] = Field(default_factory=list)
    """What it reached, and on what."""

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if (self.file is None) == (self.url is None):
            raise ValueError("needs a url, or a file of the package")
        if self.url is not None and self.sha256 is None:
            raise ValueError("a url needs the sha256 of what lies there")
        return self


class _Registry(Settings):
    checkpoints: list[Entry]


def known() -> dict[str, Entry]:
    """Return the checkpoints of the package and of the lab's registry, by name.

    Raises
    ------
    InputError
        If the lab's registry cannot be read, or is not valid.
    """
    own = Path(model.__file__).parent / "weights" / "registry.yaml"
    entries = {entry.name: entry for entry in _parsed(own.read_text("utf-8"), str(own))}
    if place := os.environ.get(VARIABLE):
        for entry in _parsed(_read(place), f"{VARIABLE}={hide_address(place)}"):
            if entry.file is not None:
                raise InputError(
                    f"{VARIABLE}: {entry.name}: file is of the package; give a url, which may be "
                    "the name of a file beside the registry"
                )
            assert entry.url is not None
            whole = entry.model_copy(update={"url": _beside(place, entry.url)})
            entries[entry.name] = whole
    return entries


def split(url: str) -> tuple[RemoteLocation | None, str]:
    """Return where a file lies, and its name there; of a local one, None and its path."""
    if urlsplit(url).scheme.lower() not in SCHEMES:
        return None, str(expanded(url.removeprefix("file://")))
    folder, _, name = urlsplit(url).path.rstrip("/").rpartition("/")
    found = locate(urlunsplit(urlsplit(url)._replace(path=folder)))
    assert isinstance(found, RemoteLocation)
    return found, name


def _read(place: str) -> str:
    folder, name = split(place)
    if folder is None:
        try:
            data: bytes | None = read_file(name, most=DOCUMENT_BYTES)
        except OSError as error:
            raise InputError(
                f"{VARIABLE}: {name}: cannot be read ({error.strerror or error})"
            ) from None
    else:
        data = folder.get(name)
    if data is None:
        raise InputError(f"{VARIABLE}: {hide_address(place)}: there is no such file")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{VARIABLE}: {hide_address(place)}: is no text (UTF-8)") from None


def _parsed(text: str, source: str) -> list[Entry]:
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: is no valid YAML ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{source}: needs a list of checkpoints")
    return parse_values(_Registry, values, source=source).checkpoints


def _beside(place: str, url: str) -> str:
    """Return an address that a registry names, relative to the registry if it has no scheme."""
    if urlsplit(url).scheme or Path(url).is_absolute():
        return url
    folder, name = split(place)
    if folder is None:
        return str(Path(name).parent / url)
    parts = urlsplit(place)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{url}"))

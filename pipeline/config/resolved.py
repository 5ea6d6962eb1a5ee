"""Where the settings of a run come from: its configuration, its checkpoint, or the defaults."""

from collections.abc import Mapping
from typing import Any, Literal

from agq.model.config import ModelConfig
from agq.model.recommended import Recommended, leaves
from agq.pipeline.config.schema import Config

Origin = Literal["configuration", "checkpoint", "default"]

Origins = dict[str, dict[str, Any]]
"""By names such as ``stitch.across``: `value`, and `from`, an `Origin`."""

_NAMES = tuple(leaves(Recommended().model_dump()))


def resolve(
    config: Config, recommended: Recommended, trained: ModelConfig | None = None
) -> tuple[Config, Origins]:
    """Fill in what a configuration leaves to its checkpoint.

    Recommended settings belong together: thresholds were chosen for these pieces in blocks of this
    size. So a configuration that cuts blocks into other pieces takes none of them. That is one
    which names other `model.pieces`, or a `model.min_affinity` or `stitch.within` of 1, which go
    with masks.

    Parameters
    ----------
    config
        What the user has written; a field that is None there is written too.
    recommended
        What the checkpoint recommends, or did when the run was begun.
    trained
        Configuration of the checkpoint, for what neither of them says.

    Returns
    -------
    config
        As the run uses it.
    origins
        Of the settings that a checkpoint may recommend. One that only the checkpoint knows is left
        out where `trained` is not given.
    """
    written = {
        name: getattr(section, field)
        for name, section, field in _fields(config)
        if field in section.model_fields_set
    }
    offered = recommended.settings if takes(config, recommended) else {}
    taken = {name: value for name, value in offered.items() if name not in written}
    for section in {name.partition(".")[0] for name in taken}:
        changes = {n.partition(".")[2]: v for n, v in taken.items() if n.startswith(f"{section}.")}
        part = getattr(config, section).model_copy(update=changes)
        config = config.model_copy(update={section: part})
    known: Mapping[str, Any] = {} if trained is None else trained.model_dump()
    origins: Origins = {}
    for name, part, field in _fields(config):
        value, origin = getattr(part, field), "default"
        if name in taken:
            origin = "checkpoint"
        elif name in written and value is not None:
            origin = "configuration"
        elif value is None and name == "model.normalise":
            value = "none"
        elif value is None:
            value, origin = known.get(_TRAINED.get(field, field)), "checkpoint"
        if value is not None:
            origins[name] = {"value": value, "from": origin}
    return config, origins


_TRAINED = {"read_shape": "input_shape"}


def takes(config: Config, recommended: Recommended) -> bool:
    """Tell whether a configuration goes with what a checkpoint recommends."""
    offered = recommended.model.pieces
    if "pieces" in config.model.model_fields_set:
        return offered in (None, config.model.pieces)
    cuts_masks = config.model.min_affinity is not None
    joins_none = "within" in config.stitch.model_fields_set and config.stitch.within >= 1
    return offered != "supervoxels" or not (cuts_masks or joins_none)


def _fields(config: Config) -> list[tuple[str, Any, str]]:
    """Return name, section and field of each setting that a checkpoint may recommend."""
    split = ((name, *name.split(".")) for name in _NAMES)
    return [(name, getattr(config, section), field) for name, section, field in split]


def told(origins: Mapping[str, Mapping[str, Any]]) -> list[tuple[Origin, str]]:
    """Return a line about the settings of each origin, the most deliberate first."""
    order: tuple[Origin, ...] = ("configuration", "checkpoint", "default")
    lines: list[tuple[Origin, str]] = []
    for origin in order:
        found = [
            f"{name.partition('.')[2]} {_short(entry['value'])}"
            for name, entry in origins.items()
            if entry["from"] == origin
        ]
        if found:
            lines.append((origin, ", ".join(found)))
    return lines


def _short(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"

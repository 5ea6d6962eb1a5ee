"""Every setting in words: type, default, allowed values and meaning, from the JSON schema."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel

from agq.errors import InputError

_PAGE_HEAD: Final = """\
# Configuration

All settings, from the schema of the code (`make docs` writes this page anew). `agq config explain
KEY` prints one of them, such as `stitch.across`. Values may hold `${NAME}` or `${NAME:-default}`
from the environment; `--set section.field=value` replaces one for a single command. Unknown names
are errors.
"""


@dataclass(frozen=True)
class Setting:
    """One setting, or a section of them.

    Attributes
    ----------
    key
        Full name, such as ``stitch.across``; empty for the whole file.
    kind
        Type and allowed values.
    default
        As YAML has it, or ``required``, or ``none``.
    meaning
        One paragraph.
    fields
        Those of a section.
    """

    key: str
    kind: str
    default: str
    meaning: str
    fields: "tuple[Setting, ...]" = ()

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    def walk(self) -> "Iterator[Setting]":
        """Yield this setting and all below it."""
        yield self
        for field in self.fields:
            yield from field.walk()


def settings_of(model: type[BaseModel]) -> Setting:
    """Return all settings of a configuration, as the section that is the whole file."""
    schema = model.model_json_schema()
    return _section("", schema, schema.get("$defs", {}), "", "required")


def find(whole: Setting, key: str) -> list[Setting]:
    """Return the setting of a full name, or those whose name ends so.

    Raises
    ------
    InputError
        If there is none; it names the nearest.
    """
    known = {setting.key: setting for setting in whole.walk()}
    if key in known:
        return [known[key]]
    ending = [setting for name, setting in known.items() if name.endswith(f".{key}")]
    if ending:
        return ending
    names = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = difflib.get_close_matches(key, known, n=1) if "." in key else []
    near = near or [names[n] for n in difflib.get_close_matches(key.rpartition(".")[2], names, n=1)]
    hint = f"did you mean {near[0]}?" if near else "`agq config explain` lists the sections"
    raise InputError(f"there is no setting {key}; {hint}")


def reference() -> str:
    """Return the page of all settings, as Markdown."""
    from agq.model.training.config import TrainConfig
    from agq.pipeline.config.schema import Config

    parts = [_PAGE_HEAD]
    for heading, model in (("`agq run` and its stages", Config), ("`agq train`", TrainConfig)):
        parts.append(f"## {heading}\n")
        shown: dict[tuple[tuple[str, str], ...], str] = {}
        for section in settings_of(model).walk():
            if section.fields:
                same = tuple((field.name, field.default) for field in section.fields)
                parts += _markdown(section, shown.get(same))
                shown.setdefault(same, section.key)
    return "\n".join(parts)


def _markdown(section: Setting, like: str | None) -> Iterator[str]:
    if section.key:
        yield f"### {section.key}\n"
    if section.meaning:
        yield f"{section.meaning}\n"
    if like is not None:
        yield f"The settings are those of `{like}`, above.\n"
        return
    yield "| setting | type | default | meaning |\n| --- | --- | --- | --- |"
    for field in section.fields:
        cells = (f"`{field.name}`", field.kind, field.default, field.meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _section(
    key: str, schema: dict[str, Any], definitions: dict[str, Any], meaning: str, default: str
) -> Setting:
    required = schema.get("required", [])
    fields = []
    for name, field in schema.get("properties", {}).items():
        inner = f"{key}.{name}".lstrip(".")
        text = " ".join(str(field.get("description", "")).split())
        given = "required" if name in required else _written(field.get("default"))
        kind, target = _kind(field, definitions), _target(field, definitions)
        if target is None:
            fields.append(Setting(inner, kind, given, text))
            continue
        if given not in ("required", "none"):
            given = "see there"
        made = _section(inner, target, definitions, text, given)
        fields.append(Setting(inner, kind, given, made.meaning, made.fields))
    meaning = meaning or " ".join(schema.get("description", "").split())
    return Setting(key, "section", default, meaning, tuple(fields))


def _written(value: Any) -> str:
    """Write a default as YAML does."""
    return "none" if value is None else json.dumps(value).strip('"')


def _target(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """Return the schema of the section that a field is, or that the items of its list are."""
    for option in (field, field.get("items", {}), *field.get("anyOf", ()), *field.get("allOf", ())):
        if "$ref" in option:
            found: dict[str, Any] = definitions[str(option["$ref"]).rpartition("/")[2]]
            if "properties" in found:
                return found
    return None


_NAMES: Final = {
    "number": "number",
    "integer": "whole number",
    "boolean": "true or false",
    "string": "text",
    "object": "mapping",
}


def _kind(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Say of what type a field is, and what it may be."""
    if "anyOf" in field:
        kinds = [_kind(option, definitions) for option in field["anyOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        target = definitions[str(field["$ref"]).rpartition("/")[2]]
        return "section" if "properties" in target else _kind(target, definitions)
    kind = str(field.get("type", "any"))
    if kind == "array":
        items = field.get("prefixItems")
        inner = _kind(items[0] if items else field.get("items", {}), definitions)
        return f"{len(items)} × {inner}" if items else f"list of {inner}"
    if kind == "string" and field.get("format") == "path":
        return "path"
    return _NAMES.get(kind, kind) + _limits(field)


def _limits(field: dict[str, Any]) -> str:
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    limits = [
        f"{word} {value:g}"
        for word, value in (
            ("at least", low), ("above", above), ("at most", high), ("below", below)
        )
        if value is not None
    ]  # fmt: skip
    return " " + ", ".join(limits) if limits else ""

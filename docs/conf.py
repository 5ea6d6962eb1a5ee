"""Builds the documentation site: `make docs`. Warnings are errors there."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.highlighting import lexers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pygments.lexers.special import TextLexer  # noqa: E402

from agq.model.training.config import TrainConfig  # noqa: E402
from agq.pipeline.config.schema import Config  # noqa: E402

project = "agq-pipeline"
author = "the agq-pipeline authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "agq-pipeline"
myst_heading_anchors = 3
autodoc_typehints = "none"
napoleon_google_docstring = False
# GitHub draws these diagrams; here they stay text, because drawing them takes code from elsewhere.
lexers["mermaid"] = TextLexer()


def configuration_reference(model: type[Any]) -> str:
    """Return every field of a configuration as Markdown tables, from its JSON schema."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    return "\n".join(_section("", schema, definitions, set()))


def _section(
    path: str, schema: dict[str, Any], definitions: dict[str, Any], seen: set[str]
) -> Iterator[str]:
    required = schema.get("required", [])
    yield f"### {path or 'top level'}\n"
    yield " ".join(schema.get("description", "").split()) + "\n"
    yield "| field | type | default | meaning |\n| --- | --- | --- | --- |"
    inner = []
    for name, field in schema.get("properties", {}).items():
        target = _reference(field)
        if target is not None and "properties" in definitions[target]:
            inner.append((f"{path}.{name}".lstrip("."), target))
        default = "required" if name in required else f"`{field.get('default')!r}`"
        if target is not None and name not in required:
            default = "see below" if field.get("default") is not None else "`None`"
        meaning = " ".join(str(field.get("description", "")).split()).replace("|", "\\|")
        yield f"| `{name}` | {_type(field, definitions)} | {default} | {meaning} |"
    yield ""
    for where, target in inner:
        if target in seen:
            yield f"### {where}\n\nThe fields of `{target}`, above.\n"
        else:
            seen.add(target)
            yield from _section(where, definitions[target], definitions, seen)


def _reference(field: dict[str, Any]) -> str | None:
    for option in (field, field.get("items", {}), *field.get("anyOf", ()), *field.get("allOf", ())):
        if "$ref" in option:
            return str(option["$ref"]).rpartition("/")[2]
    return None


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "anyOf" in field:
        kinds = [_type(option, definitions) for option in field["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        target = definitions[str(field["$ref"]).rpartition("/")[2]]
        return "section" if "properties" in target else _type(target, definitions)
    if field.get("type") == "array":
        items = field.get("prefixItems")
        kind = _type(items[0] if items else field.get("items", {}), definitions)
        return f"{len(items)} × {kind}" if items else f"list of {kind}"
    return str(field.get("type", "any"))


def _write_reference(app: Sphinx) -> None:
    text = (
        "# Configuration\n\n"
        "Made from the schema that `agq config schema` prints. Values may hold `${NAME}` or "
        "`${NAME:-default}` from the environment; `--set section.field=value` replaces one. "
        "Unknown names are errors.\n\n## `agq run` and its stages\n\n"
        + configuration_reference(Config)
        + "\n## `agq train`\n\n"
        + configuration_reference(TrainConfig)
    )
    # Sphinx reads sources from disk; an unchanged file is not read again.
    file = HERE / "configuration.md"
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Write the configuration reference before the sources are read."""
    app.connect("builder-inited", _write_reference)

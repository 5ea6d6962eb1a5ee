"""Set values in a YAML configuration and leave all else as it is, comments too."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from agq.blockwise.storage.files import write_atomic
from agq.errors import InputError
from agq.pipeline.config.yaml_settings import parse_yaml


def set_values(path: Path, values: Mapping[str, str]) -> None:
    """Set ``section.field`` to YAML scalars in a file whose sections are indented blocks.

    Raises
    ------
    InputError
        If the file cannot be read, or is written in a way in which a line cannot be set.
    """
    try:
        text = path.read_text()
        before = parse_yaml(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(before, dict):
        raise InputError(f"{path}: expected a mapping")
    lines = text.splitlines()
    wanted: dict[str, Any] = dict(before)
    for name, value in values.items():
        section, field = name.split(".")
        _set_line(lines, section, field, value)
        wanted[section] = {**(wanted.get(section) or {}), field: yaml.safe_load(value)}
    written = "\n".join(lines) + "\n"
    try:
        done = parse_yaml(written) == wanted
    except yaml.YAMLError:
        done = False
    if not done:
        raise InputError(
            f"{path}: {', '.join(values)} cannot be set in the way it is written; set them by hand"
        )
    write_atomic(path, written.encode())


def _set_line(lines: list[str], section: str, field: str, value: str) -> None:
    """Replace or add the line of one field."""
    starts = [k for k, line in enumerate(lines) if re.match(rf"{section}\s*:", line)]
    if not starts:
        lines += ["", f"{section}:", f"  {field}: {value}"]
        return
    indent = "  "
    end = starts[0] + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][0] in " #"):
        if found := re.match(rf"(\s+){field}\s*:\s*[^#]*?(\s*#.*)?$", lines[end]):
            lines[end] = f"{found[1]}{field}: {value}{found[2] or ''}"
            return
        if found := re.match(r"(\s+)\w", lines[end]):
            indent = min(indent, found[1], key=len) if end > starts[0] + 1 else found[1]
        end += 1
    lines.insert(starts[0] + 1, f"{indent}{field}: {value}")

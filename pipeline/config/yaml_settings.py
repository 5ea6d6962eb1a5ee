"""Read a YAML file into a pydantic model: variables, overrides, and errors that name the field."""

import difflib
import os
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from agq.credentials import HIDDEN, hidden, hide, is_address, remember, visible_secret
from agq.errors import InputError
from agq.reading import read_file

_MOST_BYTES = 2**19
_MOST_VALUES = 10**5
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


ModelType = TypeVar("ModelType", bound=BaseModel)


def load_yaml(model: type[ModelType], path: Path, overrides: list[str] | None = None) -> ModelType:
    """Read and check a YAML file.

    Parameters
    ----------
    model
        What the file describes.
    path
        YAML file. Values may hold ``${NAME}`` or ``${NAME:-default}``, replaced from the
        environment.
    overrides
        ``a.b=value`` settings, with YAML values, that replace those of the file.

    Raises
    ------
    InputError
        If the file cannot be read or a value is wrong; the message names every field.
    """
    try:
        text = read_file(path, most=_MOST_BYTES).decode()
    except UnicodeDecodeError:
        raise InputError(f"config {path}: not a text file") from None
    except InputError as error:
        raise InputError(f"config {error}") from None
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror or error}") from error
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        keys = ", ".join(list(model.model_fields)[:3])
        raise InputError(f"config {path}: expected a mapping with the keys {keys}, ...")
    for override in overrides or []:
        apply_override(data, override)
    return _validated(model, expand_variables(data), str(path), overrides)


def parse_yaml(text: str) -> Any:
    """Parse a YAML document of plain values.

    Raises
    ------
    yaml.YAMLError
        If it is not valid, a mapping has a key twice, or its aliases make it larger than a
        configuration is.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            _check(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("too many levels in each other") from None
    # A value that is not of its type: a date that is none, a tag on a value that does not fit it.
    except Exception as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def _check(node: yaml.Node | None) -> None:
    """Count the values of a document as often as aliases name them, and each key of a mapping."""
    waiting, values = [node], 0
    while waiting:
        values += 1
        if values > _MOST_VALUES:
            raise yaml.YAMLError(f"more than {_MOST_VALUES} values, or aliases of themselves")
        item = waiting.pop()
        if isinstance(item, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in item.value:
                # PyYAML would take the last of them, without a word.
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    problem = f"{key.value} stands here a second time"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                keys.add(str(key.value))
                waiting += [key, value]
        elif isinstance(item, yaml.SequenceNode):
            waiting += item.value


def parse_values(
    model: type[ModelType],
    data: dict[str, Any],
    overrides: list[str] | None = None,
    source: str = "settings",
) -> ModelType:
    """Check a mapping after ``a.b=value`` overrides; errors as in `load_yaml`.

    The mapping may be a record that somebody else wrote: ``${NAME}`` is replaced in the overrides,
    which the user has written, and nowhere else.
    """
    for override in overrides or []:
        apply_override(data, override, expand=True)
    return _validated(model, data, source, overrides)


def _validated(
    model: type[ModelType], data: dict[str, Any], source: str, overrides: list[str] | None
) -> ModelType:
    """Check plain data; what is wrong is said of the option that gave it, or of the source."""
    remember(data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        keys = [tuple(text.partition("=")[0].split(".")) for text in overrides or ()]
        wrong: dict[str, list[str]] = {}
        for item in error.errors(include_url=False, include_input=True):
            place = tuple(map(str, item["loc"]))
            given = any(place[: len(key)] == key for key in keys)
            lines = wrong.setdefault("--set" if given else source, [])
            line = _explain(model, item)
            if line not in lines:
                lines.append(line)
        parts = (f"{where}: {'; '.join(lines)}" for where, lines in wrong.items())
        raise InputError("; ".join(parts)) from None


def apply_override(data: dict[str, Any], override: str, *, expand: bool = False) -> None:
    """Replace one value of a plain configuration by an ``a.b=value`` setting, in place.

    With `expand`, ``${NAME}`` in the value is replaced from the environment.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {hide(override)}: expected section.field=value")
    *parents, last = key.split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        if child is None:  # absent, or recorded as not set
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise InputError(f"--set {key}: {parent} is a value, not a section")
        node = child
    try:
        given = parse_yaml(value)
    except yaml.YAMLError as error:
        # The value may be a secret, and the error repeats some of it.
        reason = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"--set {key}: the value is not valid YAML ({reason})") from None
    _refuse_visible(given, key)
    node[last] = expand_variables(given, tuple(key.split("."))) if expand else given


def _refuse_visible(value: Any, field: str) -> None:
    """Refuse a setting whose secret is in the process list, where all users of a machine see it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_visible(inner, f"{field}.{name}")
    elif isinstance(value, list):
        for inner in value:
            _refuse_visible(inner, field)
    elif isinstance(value, str):
        way = visible_secret(value)
        if field == "notify.webhook" and is_address(_VARIABLE.sub(HIDDEN, value)):
            way = (
                "other users of this machine can read command lines, and the address is a secret; "
                "put it into an environment variable, and write '${NAME}' instead"
            )
        if way:
            raise InputError(f"--set {field}: {way}")


def expand_variables(value: Any, where: tuple[str, ...] = ()) -> Any:
    """Replace ``${NAME}`` and ``${NAME:-default}`` in all texts of plain data.

    Only for what the user has written: in a record of somebody else, ``${NAME}`` could be part of
    an address that takes the value of a variable away.

    Parameters
    ----------
    value
        Mappings, lists and scalars, as YAML has them.
    where
        Names of the fields above the value, for the message.

    Raises
    ------
    InputError
        If a variable is not set and has no default.
    """
    if isinstance(value, dict):
        return {key: expand_variables(item, (*where, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_variables(item, (*where, str(i))) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name, default)
        if found is None:
            raise InputError(
                f"{'.'.join(where)}: the environment variable {name} is not set; set it or write "
                f"${{{name}:-default}}"
            )
        return found

    return _VARIABLE.sub(replace, value)


def _explain(model: type[BaseModel], item: Any) -> str:
    """Turn one pydantic error into a line with the field's full name and, if close, the fix."""
    loc = [part for part in item["loc"] if isinstance(part, str)]
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        valid = _fields_at(model, loc[:-1])
        close = difflib.get_close_matches(loc[-1], valid, n=1, cutoff=0.5)
        near = ".".join([*loc[:-1], close[0]]) if close else ""
        hint = f"did you mean '{near}'?" if close else f"valid keys: {', '.join(valid)}"
        return f"unknown key '{field}' ({hint})"
    if item["type"] == "missing":
        return f"{field} is missing"
    if item["type"] == "int_from_float" and "voxel_size" in loc:
        where = field[: field.index("voxel_size")]
        return (
            f"{where}voxel_size: {item['input']:g} is not a whole number, as world units are; give "
            f"the voxel size and {where}offset in a finer one: 4.2 nm are 42 with {where}unit: "
            "angstrom, or 4200 with pm"
        )
    message = str(item["msg"]).removeprefix("Value error, ")
    # The address of a database or a webhook is a secret: values of their sections are not repeated.
    shown = item["input"]
    if isinstance(shown, str | int | float | list | tuple) and not {"ledger", "notify"} & {*loc}:
        return f"{field}: {message} (got {hidden(shown)!r})"
    return f"{field}: {message}"


def _fields_at(model: type[BaseModel], loc: list[str]) -> list[str]:
    for name in loc:
        field = model.model_fields.get(name)
        if field is None:
            break
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return sorted(model.model_fields)

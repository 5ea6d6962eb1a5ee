"""Whole addresses of volumes, beside a record that says them without passwords and signatures.

The record ``NAME.json`` may be read by others. ``NAME.secrets.json`` beside it, for its owner only,
maps each address of the record to the whole one.
"""

import json
from pathlib import Path
from typing import Any

from agq.blockwise.storage.files import write_atomic
from agq.credentials import each_text, has_secret, hidden, hide_address, remember, texts_of
from agq.errors import DamagedError
from agq.reading import read_json


def put_away(record: Path, values: Any) -> Any:
    """Keep the whole addresses in some values apart from their record.

    Parameters
    ----------
    record
        File of the record, which the caller writes.
    values
        Plain data (JSON types). Addresses that are hidden already stay known.

    Returns
    -------
    values
        A copy in which all addresses are hidden.
    """
    shown = hidden(values)
    try:
        known = _read(record)
    except (PermissionError, DamagedError):
        known = {}
    named = set(texts_of(shown))
    whole = {text: address for text, address in known.items() if text in named}
    whole |= {hide_address(text): text for text in texts_of(values) if has_secret(text)}
    file = _file(record)
    if whole != known:
        write_atomic(file, json.dumps(whole, indent=1).encode(), mode=0o600)
    return shown


def put_back(record: Path, values: Any) -> Any:
    """Return the values of a record with whole addresses, where its owner reads it."""
    try:
        known = _read(record)
    except PermissionError:
        return values
    remember(list(known.values()))
    return each_text(values, lambda text: known.get(text, text)) if known else values


def _file(record: Path) -> Path:
    return record.with_suffix(".secrets.json")


def _read(record: Path) -> dict[str, str]:
    try:
        known = read_json(_file(record))
        if all(hide_address(address) == text for text, address in known.items()):
            return dict(known)
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError):
        pass
    raise DamagedError(
        f"{_file(record)} is damaged: delete it, and give the addresses of the volumes anew"
    )

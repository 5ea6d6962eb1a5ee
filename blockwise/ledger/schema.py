"""What the database itself checks of every ledger document."""

from typing import Any, Final

_TEXT: Final = {"bsonType": "string"}
_NUMBER: Final = {"bsonType": ["double", "int", "long"]}
_WHOLE: Final = {"bsonType": ["int", "long"]}


def _schema(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"bsonType": "object", "required": required, "properties": properties}
    return {"$jsonSchema": schema}


VALIDATORS: Final[dict[str, dict[str, Any]]] = {
    "runs": _schema(
        ["_id", "created"],
        {"_id": _TEXT, "created": _NUMBER, "updated": _NUMBER, "stages": {"bsonType": "object"}},
    ),
    "blocks": _schema(
        ["_id", "run", "stage", "block", "state", "attempt", "token", "order"],
        {
            "_id": _TEXT,
            "run": _TEXT,
            "stage": _TEXT,
            "block": _WHOLE,
            "state": {"enum": ["queued", "running", "failed", "skipped", "done"]},
            "attempt": _WHOLE,
            "token": _TEXT,
            "order": {"bsonType": "array"},
            "attempts": {"bsonType": "object"},
        },
    ),
    "workers": _schema(
        ["_id", "run", "stage", "file", "read"],
        {"_id": _TEXT, "run": _TEXT, "stage": _TEXT, "file": _TEXT, "read": _WHOLE},
    ),
}
"""By collection; set when a collection is made, so that a mistake in a client is refused."""

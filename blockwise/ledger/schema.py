"""What ledger documents hold, and what the database itself checks of them.

``runs``: one document per run; ``_id`` is the run's id in ``run.json``.

- ``run``, ``name``, ``run_dir``: id, name, folder.
- ``created``, ``updated``: when it was made, and heard of last; seconds since the epoch.
- ``config``: configuration, secrets masked; dots in keys become ``_``.
- ``grid``: volume shape, voxel size, offset, write shape, context.
- ``argv``, ``time``, ``host``, ``user``, ``versions``: the last command.
- ``stages.<stage>``: ``state``, ``blocks_total``, ``started``, ``finished``, ``error``, ``step``
  (``step_done`` of ``step_total``), ``report``.
- ``stages.<stage>.totals``: blocks: ``done``, ``skipped``, ``failed``, ``running``,
  ``duplicates``, ``conflicts``; sums over done blocks: ``voxels``, ``labels``, ``components``,
  ``dropped``, ``read_s``, ``compute_s``, ``write_s``; ``started``, ``finished``; ``session``
  (``blocks``, ``voxels`` since the last start), ``recent`` (over the last ``seconds``); ``bytes``
  of the journal, ``updated``.

``blocks``: one document per block that has begun; ``_id`` is ``<run>/<stage>/<block>``.

- ``run``, ``stage``, ``block``: block number in the grid of the whole volume.
- ``state``: ``queued``, ``running``, ``failed``, ``skipped`` or ``done``.
- ``attempt``, ``token``: attempt; token of the process, which ``workers`` names.
- ``order``: rank of the state.
- ``started``, ``finished``, ``read_s``, ``compute_s``, ``write_s``: times; the parts overlap
  between blocks.
- ``labels``, ``dropped``, ``voxels``: counts.
- ``reason``, ``error``: why skipped or failed; traceback.
- ``roi.offset``, ``roi.shape``: of a failed block: write ROI in world units, z, y, x.
- ``attempts``: failed ones, by ``<token>-<attempt>``: ``attempt``, ``worker``, ``host``, ``job``,
  ``device``, ``gpu``, ``started``, ``finished``, ``reason``, ``error`` (last 4096 characters).

``workers``: one document per journal file (process and stage); ``_id`` is
``<run>/<stage>/<file>``.

- ``run``, ``stage``, ``file``, ``token``: which journal file.
- ``name``, ``host``, ``pid``, ``device``, ``gpu``, ``gpu_bytes``, ``job``, ``started``: the
  process.
- ``last``: time of its last journal line; one every 30 s.
- ``voxels_per_s``: since it started.
- ``done``, ``skipped``, ``failed``, ``voxels``: attempts that it ended; voxels of done blocks.
- ``current``: up to 16 blocks in hand: ``block``, ``attempt``, ``begun``.
- ``exit``: why it ended; null while it runs, or if it was killed.
- ``read``, ``delivered``: journal bytes behind this document, and delivered to ``blocks``.

Empty fields and 0 are left out. Checksums are in the journal alone. Documents of earlier releases
are read as they are; an old collection keeps its own validators. The first coordinator makes the
indexes: ``blocks`` unique (run, stage, block) and (run, stage, state); ``workers`` (run, stage,
exit); ``runs`` (created).
"""

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

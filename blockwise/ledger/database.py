"""Block progress in MongoDB: a view of the journal that may lag, never a truth of its own.

Only the coordinator writes here, from journal lines (`ledger.feeder`); workers know nothing
of the database. Every write says what is so (never "one more"), and carries a key that tells older
from newer, so that a write sent twice, late or in another order changes nothing:

- a block document is replaced only by one with a larger ``order`` (rank of the state, time,
  attempt, token);
- a worker document only by one made from at least as many journal bytes;
- the totals of a stage likewise.

Collections, fields and indexes: `ledger.schema`.
"""

import atexit
import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final

from pymongo import ASCENDING, MongoClient, UpdateOne
from pymongo.errors import (
    BulkWriteError,
    CollectionInvalid,
    ConfigurationError,
    OperationFailure,
    PyMongoError,
)
from pymongo.synchronous import monitor

from agq.blockwise.journal.records import BlockState
from agq.blockwise.ledger.schema import VALIDATORS
from agq.blockwise.ledger.settings import (
    URI_VARIABLE,
    LedgerError,
    LedgerSettings,
    Secrets,
    shown_uri,
)
from agq.blockwise.ledger.updates import Document

logger = logging.getLogger(__name__)

# Write errors that no retry can heal: the server refuses this document, not the moment.
_REFUSED: Final = frozenset({2, 14, 52, 121, 10334, 17280})
_AUTH_FAILED: Final = frozenset({18, 8000})
_FORBIDDEN: Final = 13


class Ledger:
    """A database that mirrors runs. Made by `connect`.

    Parameters
    ----------
    uri : str
        MongoDB URI with its password.

    Attributes
    ----------
    shown : str
        The URI as messages may show it.

    Raises
    ------
    LedgerError
        If the URI is malformed.
    """

    def __init__(self, uri: str, settings: LedgerSettings) -> None:
        self._secrets = Secrets(uri)
        self.shown = shown_uri(uri)
        self.settings = settings
        try:
            # pymongo drops an option it does not understand with a warning; a misspelt tls would
            # send the password in clear.
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                self._client = self._open(uri)

        except (PyMongoError, ValueError, OSError, UserWarning) as error:
            raise self.error(error) from None
        database = self._client.get_database(settings.database)
        self.runs = database["runs"]
        self.blocks = database["blocks"]
        self.workers = database["workers"]
        self._prepared = False

    def _open(self, uri: str) -> MongoClient[Document]:
        milliseconds = int(self.settings.timeout_s * 1000)
        query = uri.partition("?")[2].lower()
        # Acknowledged means durable, unless the URI says otherwise: the feeder never sends again
        # what the database has acknowledged.
        durable: dict[str, Any] = {} if "w=" in query else {"w": "majority", "journal": True}
        return MongoClient(
            uri,
            serverSelectionTimeoutMS=milliseconds,
            connectTimeoutMS=milliseconds,
            socketTimeoutMS=4 * milliseconds,
            wTimeoutMS=4 * milliseconds,
            appname="agq",
            # One record that another program has spoiled must not hide all others.
            datetime_conversion="DATETIME_AUTO",
            unicode_decode_error_handler="replace",
            **durable,
        )

    def error(self, error: BaseException | str) -> LedgerError:
        """Turn an error into one line without the password."""
        text = self._secrets.hide(error)
        if isinstance(error, OperationFailure) and error.code in _AUTH_FAILED:
            text = "user or password refused"
        elif isinstance(error, OperationFailure) and error.code == _FORBIDDEN:
            text = f"the user may not do this in database {self.settings.database!r}: {text}"
            text = text.partition(", full error:")[0] + "; a run needs the role readWrite"
        elif isinstance(error, ConfigurationError | UserWarning):
            text = f"malformed URI or option: {text}"
        # pymongo appends the whole answer or the description of all servers to the reason.
        text = (
            text.partition(", full error:")[0]
            .partition(", Timeout:")[0]
            .partition(" (configured timeouts:")[0]
        )
        return LedgerError(f"database {self.shown}: {text[:300]}")

    def hide(self, text: object) -> str:
        """Return one line of the text without the password."""
        return self._secrets.hide(text)

    def ping(self) -> None:
        """Check that the database answers and takes the password.

        Raises
        ------
        LedgerError
            If it does not.
        """
        try:
            self._client.admin.command("ping")
            self.runs.find_one({"_id": ""})
        except (PyMongoError, OSError) as error:
            raise self.error(error) from None

    def prepare(self, *, again: bool = False) -> None:
        """Make the collections with their validators, and the indexes, once per process.

        Parameters
        ----------
        again : bool
            Whatever was done before: somebody may have dropped the database.

        Raises
        ------
        PyMongoError
            If the database is away or refuses.
        """
        if self._prepared and not again:
            return
        existing = self.runs.database.list_collection_names()
        for name in VALIDATORS.keys() - set(existing):
            # Another coordinator may be faster.
            with contextlib.suppress(CollectionInvalid):
                self.runs.database.create_collection(name, validator=VALIDATORS[name])
        key = [("run", ASCENDING), ("stage", ASCENDING)]
        self.blocks.create_index([*key, ("block", ASCENDING)], unique=True, name="block")
        self.blocks.create_index([*key, ("state", ASCENDING)], name="state")
        self.workers.create_index([*key, ("exit", ASCENDING)], name="run")
        self.runs.create_index([("created", ASCENDING)], name="created")
        self._prepared = True

    def require_writable(self) -> None:
        """Make what a run needs here, or close the connections and say why that cannot be done.

        Raises
        ------
        LedgerError
            If the user may not write, or the database is away, full or read-only.
        """
        try:
            self.prepare()
        except (PyMongoError, OSError) as error:
            self.close()
            raise self.error(error) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def leave(self) -> None:
        """Close the connections of a process that ends now.

        At the exit pymongo would wait for its threads, which sleep for half a second at a time.
        They are daemons, and with the client closed they have nothing left to do.
        """
        self.close()
        wait = getattr(monitor, "_shutdown_resources", None)
        if wait is not None:
            atexit.unregister(wait)

    # Writing, for the feeder

    def set_run(self, run: str, fields: Document) -> bool:
        """Set fields (dotted paths allowed) of a run's document; tell whether it is a new one."""
        made = {} if "created" in fields else {"created": time.time()}
        update = {"$set": fields} | ({"$setOnInsert": made} if made else {})
        return self.runs.update_one({"_id": run}, update, upsert=True).upserted_id is not None

    def set_totals(self, run: str, stage: str, size: int, totals: Document) -> None:
        """Set the totals of a stage, unless its totals were made from more journal bytes."""
        path = f"stages.{stage}.totals"
        older = [{f"{path}.bytes": {"$lte": size}}, {path: {"$exists": False}}]
        update = {"$set": {path: totals | {"bytes": size}}}
        self.runs.update_one({"_id": run, "$or": older}, update)

    def write(self, collection: str, updates: Sequence[UpdateOne]) -> int:
        """Send updates unordered, in one bulk write.

        Returns
        -------
        int
            Documents that the server refuses for what they are; sending them again is no use.

        Raises
        ------
        PyMongoError
            If anything else went wrong: send all of them again.
        """
        if not updates:
            return 0
        try:
            self.runs.database[collection].bulk_write(list(updates), ordered=False)
        except BulkWriteError as error:
            failed = error.details.get("writeErrors", [])
            refused = [e for e in failed if e.get("code") in _REFUSED]
            if len(refused) < len(failed) or error.details.get("writeConcernErrors"):
                raise
            logger.error(
                "ledger: %d documents refused, first: %s",
                len(refused),
                self.hide(refused[0].get("errmsg"))[:200],
            )
            return len(refused)
        return 0

    # Reading

    def delivered(self, run: str, stage: str) -> dict[str, int]:
        """Return the bytes of each journal file that are already here."""
        workers = self.workers.find({"run": run, "stage": stage}, {"file": 1, "delivered": 1})
        return {doc["file"]: int(doc["delivered"]) for doc in workers}

    def find_run(self, run: str) -> Document | None:
        """Return the document of a run."""
        return self.runs.find_one({"_id": run})

    def find_blocks(
        self, run: str, stage: str, state: str | None = None, limit: int = 0
    ) -> Iterator[Document]:
        """Yield block documents by block number (limit 0: all)."""
        query = {"run": run, "stage": stage} | ({"state": state} if state else {})
        yield from self.blocks.find(query).sort("block", ASCENDING).limit(limit)

    def ended_blocks(self, run: str, stage: str, fields: Sequence[str]) -> Iterator[Document]:
        """Yield some fields of every block that has ended."""
        ended = [state.word for state in BlockState if state]
        query = {"run": run, "stage": stage, "state": {"$in": ended}}
        yield from self.blocks.find(query, dict.fromkeys(fields, 1))

    def failure_reasons(self, run: str, stage: str) -> Iterator[tuple[str, int, int]]:
        """Yield each reason of failed blocks, their number, and the first of them, in no order."""
        failed: Document = {"$match": {"run": run, "stage": stage, "state": "failed"}}
        group: Document = {"_id": "$reason", "count": {"$sum": 1}, "first": {"$min": "$block"}}
        # Every block may have a reason of its own: more than the server holds in memory.
        for d in self.blocks.aggregate([failed, {"$group": group}], allowDiskUse=True):
            yield str(d["_id"] or ""), int(d["count"]), int(d["first"])

    def find_block(self, run: str, stage: str, block: int) -> Document | None:
        """Return the document of a block."""
        return self.blocks.find_one({"run": run, "stage": stage, "block": block})

    def find_workers(self, run: str, stage: str) -> list[Document]:
        """Return the worker documents of a stage."""
        return list(self.workers.find({"run": run, "stage": stage}).sort("name", ASCENDING))

    def remove_stage(self, run: str, stage: str) -> None:
        """Delete the blocks, workers and totals of a stage that was started over."""
        for collection in (self.blocks, self.workers):
            collection.delete_many({"run": run, "stage": stage})
        self.runs.update_one({"_id": run}, {"$unset": {f"stages.{stage}.totals": ""}})

    def remove_old(self, user: str, days: float, keep: str | None = None) -> int:
        """Delete the runs of a user that rest: no stage runs, and nothing came for some days.

        Parameters
        ----------
        keep : str, optional
            Run to leave alone.

        Returns
        -------
        int
            How many were deleted.
        """
        query = {"user": user, "updated": {"$lt": time.time() - 86400 * days}}
        removed = 0
        for doc in list(self.runs.find(query, {"updated": 1, "stages": 1})):
            if doc["_id"] == keep or not _rests(doc):
                continue
            # A delivery since then has written another time.
            if self.runs.find_one({"_id": doc["_id"], "updated": doc["updated"]}, {"_id": 1}):
                self.remove_run(doc["_id"])
                removed += 1
        return removed

    def remove_run(self, run: str) -> None:
        """Delete everything of a run.

        Whenever this is cut short, the next delivery brings back the whole run: how far one has
        come is said by the workers' documents, and a feeder at work looks for the run's.
        """
        for collection in (self.workers, self.blocks):
            collection.delete_many({"run": run})
        self.runs.delete_one({"_id": run})


def _rests(run: Document) -> bool:
    """Whether no stage of a run says that it runs; a document that cannot be read may be alive."""
    stages = run.get("stages", {})
    if not isinstance(stages, dict) or not all(isinstance(s, dict) for s in stages.values()):
        return False
    return all(stage.get("state") != "running" for stage in stages.values())


def connect(settings: LedgerSettings) -> Ledger | None:
    """Open the ledger that the settings name.

    Returns
    -------
    Ledger or None
        None where no URI is given. Where `required` is false the database may be away: a warning
        says so, and the feeder delivers when it is back.

    Raises
    ------
    LedgerError
        If the settings are wrong, or the database is required and there is none, or it cannot be
        reached or refuses the password.
    """
    uri = settings.resolve()
    if uri is None:
        if settings.required:
            raise LedgerError(
                "no database is named: set the environment variable "
                f"{URI_VARIABLE}, or ledger.uri_file in the configuration"
            )
        return None
    ledger = Ledger(uri.get_secret_value(), settings)
    try:
        ledger.ping()
    except LedgerError as error:
        if settings.required:
            ledger.close()
            raise
        logger.warning("%s; the run goes on, the journal keeps what is to be delivered", error)
    return ledger

"""Where an export is written: a local folder, or a bucket of an object store; through tensorstore.

What is being done is written down in a local folder, `Target.work`: lines cannot be added to an
object. The mark of an export in a bucket names that folder, so neither is believed without the
other: where the mark is gone, the folder is a new one, and where the folder is gone, all is done
again.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from agq.blockwise.stitch.steps import digest
from agq.blockwise.storage.files import fsync_path, make_folder, write_atomic
from agq.blockwise.volumes.location import LocalLocation, Location, RemoteLocation, locate
from agq.credentials import hide
from agq.errors import InputError
from agq.paths import expanded, scheme_of
from agq.reading import parse_json

FOLDER = ".agq-export"
"""Of the mark, and of what is being done for a local export."""

MARK = f"{FOLDER}/export.json"

WRITABLE = ("s3", "gs")
"""Schemes of addresses that can be written to."""

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A folder or a bucket; its keys are paths such as ``skeletons/info``.

    Attributes
    ----------
    location
        Folder, or address of a bucket with a prefix.
    work
        Local folder for the journal and for tables that are made on the way. All workers see it.
    """

    location: Location
    work: Path

    @classmethod
    def of(cls, out: Target | Path | str, work: Path | None = None) -> Target:
        """Return the target that a path or an address means; nothing is made or asked yet.

        Parameters
        ----------
        out
            Folder, ``s3://bucket/prefix`` or ``gs://bucket/prefix``.
        work
            Folder below which exports to buckets keep what they are doing; default
            ``agq-exports`` in the current one. A local target keeps it in itself.

        Raises
        ------
        InputError
            If the address cannot be written to.
        """
        if isinstance(out, Target):
            return out
        if scheme := scheme_of(out):
            if scheme not in WRITABLE:
                raise InputError(
                    f"{hide(str(out))}: cannot be written to; give a local folder, or an address"
                    " that begins with s3:// or gs://"
                )
            return cls(locate(out), (work or Path("agq-exports")).absolute())
        root = expanded(out).absolute()
        return cls(LocalLocation(root), root / FOLDER)

    @property
    def text(self) -> str:
        """Path or address, for messages."""
        return self.location.text

    @property
    def is_local(self) -> bool:
        """Whether it is a folder."""
        return isinstance(self.location, LocalLocation)

    @property
    def place(self) -> Path:
        """A path that stands for the target, whatever is in it."""
        if isinstance(self.location, LocalLocation):
            return self.location.root
        return self.work / digest(self.text)

    def store(self, key: str = "") -> dict[str, Any]:
        """Return the tensorstore key-value store spec of the folder `key`."""
        return self.location.key_value_store(key)

    def read(self, key: str) -> bytes | None:
        """Return a document, or None if there is none."""
        return self.location.get(key)

    def write(self, key: str, data: bytes) -> None:
        """Write a whole document or file; durable on return.

        Raises
        ------
        InputError
            If the bucket refuses it.
        OSError
            If the disk does.
        """
        if isinstance(self.location, LocalLocation):
            write_atomic(self.location.root / key, data)
        else:
            self._ask(lambda store: store.write(key, data).result())

    def write_json(self, key: str, document: Any) -> None:
        """Write a JSON document, without spaces."""
        self.write(key, json.dumps(document, separators=(",", ":")).encode())

    def write_file(self, key: str, file: Path) -> None:
        """Move a file of the working folder into the target, or upload it in pieces."""
        if isinstance(self.location, LocalLocation):
            path = self.location.root / key
            make_folder(path.parent)
            file.replace(path)
            fsync_path(path.parent)
            return
        self.location.put_file(key, file)

    def refer(self, name: str, folder: str) -> None:
        """Say in the ``info`` of the volume where properties, meshes or skeletons are."""
        info = parse_json(self.read("info") or b"{}")
        self.write_json("info", {**info, name: folder})

    def opened(self) -> Target:
        """Return the target with its working folder; its mark must be there."""
        if self.is_local:
            return self
        record = parse_json(self.read(MARK) or b"{}")
        return replace(self, work=make_folder(self.work / _token(record)))

    def names(self) -> set[str]:
        """Return what lies at the top: files and folders; nothing if it does not exist.

        Raises
        ------
        InputError
            If it is a file, or the bucket cannot be asked.
        """
        if isinstance(self.location, RemoteLocation):
            return self.location.names()
        root = self.location.root
        if root.exists() and not root.is_dir():
            raise InputError(f"{root} is a file; choose another folder")
        return {entry.name for entry in root.iterdir()} if root.is_dir() else set()

    def remove(self, prefix: str) -> None:
        """Remove the folder or file of this name with all that is in it."""
        if isinstance(self.location, LocalLocation):
            path = self.location.root / prefix
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        import tensorstore as ts

        # "0" comes after "/".
        below = ts.KvStore.KeyRange(f"{prefix}/", f"{prefix}0")
        self._ask(lambda store: store.delete_range(below).result())
        self._ask(lambda store: store.write(prefix, None).result())

    def clear(self) -> None:
        """Remove all: first what says that something is done, last what says that it is ours."""
        shutil.rmtree(self.work / "journal", ignore_errors=True)
        names = self.names()
        for name in sorted(names - {FOLDER}):
            self.remove(name)
        if FOLDER in names:
            self.remove(FOLDER)

    def marked(self, recorded: dict[str, Any] | None, record: dict[str, Any]) -> Target:
        """Write the mark of an export, and make its working folder.

        Parameters
        ----------
        recorded
            The mark that is there; the export goes on.
        record
            What it says.
        """
        target = self
        if not self.is_local:
            token = _token(recorded or {"work": secrets.token_hex(8)})
            record = {**record, "work": token}
            target = replace(self, work=self.work / token)
        make_folder(target.work)
        self.write(MARK, json.dumps(record, indent=1).encode())
        return target

    def _ask(self, action: Callable[[Any], T]) -> T:
        import tensorstore as ts

        try:
            return action(ts.KvStore.open(self.store()).result())
        except ValueError as error:
            raise InputError(f"{self.text}: {first_line(error)}") from None


def _token(record: dict[str, Any]) -> str:
    token = str(record.get("work", ""))
    # It comes from outside, and becomes the name of a folder.
    if not token.isalnum():
        raise InputError(f"{MARK} of the export is damaged; use --overwrite to replace it")
    return token


def first_line(error: object) -> str:
    """Return what tensorstore says first, without its notes for programs."""
    return hide(str(error)).split(" [")[0].splitlines()[0]

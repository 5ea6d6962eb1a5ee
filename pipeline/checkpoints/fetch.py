"""Fetches a checkpoint into the folder of fetched ones: whole, checked, and under its name.

A download that ends early leaves what it has; the next one goes on there. A file appears under its
name only when its sha256 is the one that was asked for and it loads as a checkpoint.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from agq.blockwise.storage.files import fsync_path, make_folder
from agq.blockwise.storage.locks import LockedError, hold
from agq.caches import checkpoints_folder
from agq.credentials import hide_address
from agq.errors import InputError
from agq.pipeline.checkpoints.registry import VARIABLE, known, split
from agq.reading import open_file, require_file

Step = Callable[[int, int], None]
"""Takes bytes done, and bytes in all."""

_PIECE_BYTES = 2**20
_MOST_BYTES = 2**34
_TRIES = 5
"""Of a download that breaks off, as long as each brings something."""

_ENDINGS = re.compile(r"(\.safetensors|\.pth\.tar|\.pth|\.pt)$")


@dataclass(frozen=True)
class Wanted:
    """What is fetched.

    Attributes
    ----------
    name
        Under which `model.checkpoint` finds it.
    url
        Address or path of the file.
    sha256
        Of the file, 64 hexadecimal digits.
    """

    name: str
    url: str
    sha256: str


def find(asked: str, sha256: str | None, name: str | None, mirror: str | None) -> Wanted:
    """Find out what a name or an address stands for.

    Parameters
    ----------
    asked
        A name of a registry, or an address or path.
    sha256
        Of the file; needed for an address.
    name
        What to call it; by default the registry's name, or that of the file without its ending.
    mirror
        Folder or address of a folder that holds the file, in place of the registry's.

    Raises
    ------
    InputError
        If a name is not known, or an address has no sha256.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise InputError(f"--sha256 {sha256}: is not 64 hexadecimal digits")
    entries = known()
    if "/" in asked:
        if sha256 is None:
            raise InputError(
                f"{hide_address(asked)}: give --sha256 too, as its authors publish it: what is"
                " fetched is checked"
            )
        url, digest, own = asked, sha256, _ENDINGS.sub("", _last(asked).lower())
    else:
        if asked not in entries:
            raise InputError(
                f"{asked}: no checkpoint of this name; there are {', '.join(entries)}"
                f" (agq checkpoint list), more by {VARIABLE}=FILE, or give an address with --sha256"
            )
        entry = entries[asked]
        if entry.url is None or entry.sha256 is None:
            raise InputError(f"{asked} comes with the package: model.checkpoint takes it as it is")
        url, digest, own = entry.url, entry.sha256, asked
        if sha256 is not None and sha256.lower() != digest:
            raise InputError(f"--sha256: the registry says {digest} for {asked}")
    if mirror is not None:
        parts = urlsplit(mirror)
        path = f"{parts.path.rstrip('/')}/{_last(url)}"
        url = urlunsplit(parts._replace(path=path))
    own = name or own
    if not re.fullmatch("[a-z0-9][a-z0-9._-]{0,63}", own):
        raise InputError(
            f"--name {own}: give a name of small letters, digits, '.', '_' and '-', at most 64"
        )
    if own in entries and own != asked:
        raise InputError(f"--name {own}: the registry has another checkpoint of this name")
    return Wanted(own, url, digest.lower())


def fetch(wanted: Wanted, on_progress: Step | None = None) -> tuple[Path, bool]:
    """Fetch a checkpoint, unless it is there.

    Returns
    -------
    file, fetched
        Where it is, and whether it was fetched now.

    Raises
    ------
    InputError
        If it cannot be read, is not what was asked for, or is no checkpoint.
    """
    folder = checkpoints_folder()
    file = folder / wanted.name
    if file.is_file() and _sha256(file) == wanted.sha256:
        return file, False
    make_folder(folder)
    part = folder / f".{wanted.name}.{wanted.sha256[:16]}.part"
    lock = part.with_suffix(".lock")
    try:
        with hold(lock):
            try:
                _download(wanted, part, on_progress or (lambda done, total: None))
                _require_wanted(part, wanted)
                fsync_path(part)
                part.replace(file)
                fsync_path(folder)
            finally:
                lock.unlink(missing_ok=True)
    except LockedError as error:
        raise InputError(f"{wanted.name} is being fetched by another process ({error})") from None
    return file, True


def _download(wanted: Wanted, part: Path, on_progress: Step) -> None:
    """Bring the file `part` to its full length, from where it is."""
    for attempt in range(_TRIES):
        begun = part.stat().st_size if part.exists() else 0
        try:
            size, first, pieces = _open(wanted.url, begun)
            if size > _MOST_BYTES:
                raise InputError(
                    f"{hide_address(wanted.url)}: has {size:,} bytes; a checkpoint has at most"
                    f" {_MOST_BYTES:,}"
                )
            with part.open("r+b" if begun else "wb") as file:
                file.truncate(first)
                file.seek(first)
                done = first
                on_progress(done, size)
                for piece in pieces:
                    file.write(piece)
                    done += len(piece)
                    on_progress(done, size)
            if done >= size:
                return
        except InputError:
            more = part.exists() and part.stat().st_size > begun
            if attempt == _TRIES - 1 or not more:
                raise
    raise InputError(
        f"{hide_address(wanted.url)}: broke off {_TRIES} times; run the command again, it goes on"
    )


def _open(url: str, start: int) -> tuple[int, int, Iterator[bytes]]:
    """Return the size of a file, the first byte that comes, and the bytes."""
    folder, name = split(url)
    if folder is not None:
        try:
            # The last byte again: a server has no part that begins at the end.
            return folder.stream(name, max(0, start - 1))
        except InputError:
            if not start:
                raise
            return folder.stream(name)
    path = Path(name)

    def pieces_of() -> Iterator[bytes]:
        with open_file(path) as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece

    try:
        require_file(path)
        return path.stat().st_size, 0, pieces_of()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_wanted(part: Path, wanted: Wanted) -> None:
    """Remove what was downloaded, and say why, if it is not what was asked for."""
    from agq.model.checkpoint import load  # brings torch with it

    source = hide_address(wanted.url)
    found = _sha256(part)
    problem = ""
    if found != wanted.sha256:
        problem = f"{source}: is not what was asked for: its sha256 is {found}, not {wanted.sha256}"
    else:
        try:
            load(part)
        except InputError as error:
            problem = str(error).replace(str(part), source)
    if problem:
        part.unlink()
        raise InputError(f"{problem}; nothing is kept")


def _last(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name

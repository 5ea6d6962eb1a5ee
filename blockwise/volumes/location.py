"""Where a container lies: a local folder, or an object store reached by URL (read-only).

Endpoints and credentials of object stores come from the environment, under the names that their
own tools use: ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_REGION``, ``AWS_SKIP_SIGNATURE=true`` for public buckets, ``GOOGLE_SERVICE_ACCOUNT`` ...
A web server may want a user and password, or the query of a signed address: each file is then asked
for with them.
"""

import base64
import functools
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from zarr.abc.store import Store
from zarr.storage import ObjectStore

from agq.credentials import HIDDEN, has_secret, hide, hide_address, remember
from agq.errors import InputError
from agq.paths import expanded
from agq.reading import DOCUMENT_BYTES, NotAFileError, read_file, require_size
from agq.stores import RegularFiles

SCHEMES = ("s3", "gs", "http", "https")
"""URL schemes that can be read."""

T = TypeVar("T")

_STREAMED = 2**16
"""Least bytes of a piece of a stream: what one that breaks off loses."""


@dataclass(frozen=True)
class LocalLocation:
    """A container in a local folder: files under keys such as ``raw/zarr.json``."""

    root: Path

    @property
    def text(self) -> str:
        """The resolved path."""
        return str(self.root)

    @property
    def address(self) -> str:
        """The same."""
        return self.text

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.root.name

    def parent(self) -> "LocalLocation | None":
        """Return the folder above, if there is one."""
        return None if self.root.parent == self.root else LocalLocation(self.root.parent)

    def get(self, key: str) -> bytes | None:
        """Return the document of a key, or None if there is none."""
        path = self.root / key
        try:
            return read_file(path, most=DOCUMENT_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except NotAFileError:
            if path.is_dir():  # a group of such a name
                return None
            raise
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error

    def folders(self, key: str) -> list[str] | None:
        """Return the names of the folders below `key`, sorted; None where there is no listing."""
        folder = self.root / key
        try:
            return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        except (OSError, ValueError):
            return []

    def zarr_store(self) -> Store:
        """Return the container as a read-only zarr store."""
        return RegularFiles(self.root, read_only=True)

    def key_value_store(self, key: str) -> dict[str, Any]:
        """Return the tensorstore key-value store spec of the folder `key`."""
        return {"driver": "file", "path": f"{self.root / key}/"}


@dataclass(frozen=True)
class RemoteLocation:
    """A container behind a URL; its keys are those of a local one."""

    url: str = field(repr=False)

    @property
    def address(self) -> str:
        """The whole URL, to open it again."""
        return self.url

    @property
    def text(self) -> str:
        """The URL, without a user name, password or query that may hold secrets."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return urlsplit(self.url).path.rstrip("/").rpartition("/")[2]

    def parent(self) -> "RemoteLocation | None":
        """Return the folder above, if there is one in the bucket or on the server."""
        parts = urlsplit(self.url)
        above, _, name = parts.path.rstrip("/").rpartition("/")
        return RemoteLocation(urlunsplit(parts._replace(path=above))) if name else None

    def get(self, key: str) -> bytes | None:
        """Return one whole file, or None if there is none."""
        from obstore.exceptions import PermissionDeniedError

        def fetch() -> bytes | None:
            try:
                found = _object_store(self.url).get(key)
                require_size(f"{self.text}/{key}", found.meta["size"], DOCUMENT_BYTES)
                return bytes(found.bytes())
            except (FileNotFoundError, PermissionDeniedError):
                # Buckets that may not be listed answer 403 for keys that do not exist.
                return None

        return self._try(fetch)

    def stream(self, key: str, start: int = 0) -> tuple[int, int, Iterator[bytes]]:
        """Read one large file piece by piece.

        Parameters
        ----------
        key
            The file.
        start
            First byte that is wanted.

        Returns
        -------
        size, first, pieces
            Bytes in all; the first byte that comes, 0 where a server gives no parts; the bytes.

        Raises
        ------
        InputError
            If there is no such file or it cannot be read; `pieces` raises it too.
        """
        from obstore.exceptions import NotSupportedError

        def ask() -> tuple[int, int, Iterator[Any]]:
            store = _object_store(self.url)
            try:
                found = store.get(key, options={"range": {"offset": start}} if start else None)
            except NotSupportedError:
                found = store.get(key)
            return found.meta["size"], found.range[0], iter(found.stream(min_chunk_size=_STREAMED))

        def pieces(stream: Iterator[Any]) -> Iterator[bytes]:
            while (piece := self._try(lambda: next(stream, None))) is not None:
                yield bytes(piece)

        size, first, stream = self._try(ask)
        return size, first, pieces(stream)

    def folders(self, key: str) -> list[str] | None:
        """Return the names of the folders below `key`; None where they cannot be listed."""
        if self.url.startswith("http"):
            return None

        from obstore.exceptions import PermissionDeniedError

        def listing() -> list[str] | None:
            try:
                result = _object_store(self.url).list_with_delimiter(key or None)
            except PermissionDeniedError:
                return None
            return sorted(prefix.rsplit("/", 1)[-1] for prefix in result["common_prefixes"])

        return self._try(listing)

    def names(self) -> set[str]:
        """Return the names of the folders and files at the top of a bucket.

        Raises
        ------
        InputError
            If they cannot be listed.
        """

        def listing() -> set[str]:
            result = _object_store(self.url).list_with_delimiter()
            paths = [*result["common_prefixes"], *(found["path"] for found in result["objects"])]
            return {path.rstrip("/").rpartition("/")[2] for path in paths}

        return self._try(listing)

    def put_file(self, key: str, file: Path) -> None:
        """Upload a file in pieces.

        Raises
        ------
        InputError
            If the bucket refuses it.
        """

        def upload() -> None:
            with file.open("rb") as opened:
                _object_store(self.url).put(key, opened)

        self._try(upload)

    def zarr_store(self) -> Store:
        """Return the container as a read-only zarr store."""
        return ObjectStore(_object_store(self.url), read_only=True)

    def key_value_store(self, key: str) -> dict[str, Any]:
        """Return the tensorstore key-value store spec of the folder `key`."""
        parts = urlsplit(self.url)
        path = "/".join(part for part in (parts.path.strip("/"), key) if part) + "/"
        if parts.scheme == "s3":
            spec: dict[str, Any] = {"driver": "s3", "bucket": parts.netloc, "path": path}
            if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
                spec["endpoint"] = endpoint
            if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
                spec["aws_region"] = region
            # Named, where they are: the search for others writes errors about missing files.
            if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
                spec["aws_credentials"] = {"type": "anonymous"}
            elif os.environ.get("AWS_ACCESS_KEY_ID"):
                spec["aws_credentials"] = {"type": "environment"}
            return spec
        if parts.scheme == "gs":
            return {"driver": "gcs", "bucket": parts.netloc, "path": path}
        base, headers = _web_request(self.url)
        return {
            "driver": "http",
            # A query of it is that of every request.
            "base_url": urlunsplit(urlsplit(base)._replace(path="")),
            "path": "/" + path,
            "headers": [f"{name}: {value}" for name, value in headers.items()],
        }

    def _try(self, action: Callable[[], T]) -> T:
        from obstore.exceptions import BaseError

        try:
            return action()
        except (BaseError, OSError) as error:
            first_line = hide(str(error).strip().splitlines()[0])
            raise InputError(
                f"{self.text}: cannot be read ({type(error).__name__}: {first_line}); check the "
                "address, the credentials and the endpoint in the environment"
            ) from shown_cause(error)


Location = LocalLocation | RemoteLocation


def shown_cause(error: Exception) -> Exception:
    """Return an error as the cause of another: tracebacks print it, and it may hold secrets."""
    printed = "".join(traceback.format_exception(error))
    return error if hide(printed) == printed else OSError(hide(error))


def locate(path: str | os.PathLike[str]) -> Location:
    """Find a container.

    It is a local folder, or a URL that starts with s3://, gs://, http:// or https://. The prefix
    ``precomputed://`` of neuroglancer may stand before either: what lies there says what it is.

    Raises
    ------
    InputError
        If the local folder does not exist or the URL cannot be used. An object store is not
        contacted yet.
    """
    text = os.fspath(path).removeprefix("precomputed://")
    try:
        scheme = urlsplit(text).scheme.lower() if "://" in text else ""
    except ValueError:
        raise InputError(
            f"{hide_address(text)}: not a usable address; write / [ ] ? # @ in a password as"
            " %2F %5B %5D %3F %23 %40"
        ) from None
    if scheme in SCHEMES:
        remember(text)
        return RemoteLocation(_checked(text))
    if scheme == "file":
        text = text[len("file://") :]
    elif scheme:
        raise InputError(
            f"{hide_address(text)}: cannot read {scheme}:// addresses; use a local path or one of "
            + ", ".join(f"{readable}://" for readable in SCHEMES)
        )
    folder = expanded(text)
    try:
        exists = folder.exists()
    except OSError as error:
        raise InputError(f"{folder}: cannot be looked up ({error.strerror})") from error
    if not exists:
        raise InputError(f"{folder}: no such file or folder; correct the path")
    if not folder.is_dir():
        raise InputError(
            f"{folder} is a file, not a zarr, N5 or precomputed container; `agq import` turns tif "
            "stacks, h5, npz and npy files into zarr"
        )
    return LocalLocation(folder.resolve())


def _checked(url: str) -> str:
    """Return the URL of a container; refuse secrets that are hidden, or of no use."""
    shown = hide_address(url)
    if shown == url and HIDDEN in url:
        raise InputError(
            f"{url}: the password or signature of this address is not recorded; give all of it in "
            "the configuration, or put it into an environment variable, for example RAW_URL, and "
            "set the field to it: --set 'input.raw.path=${RAW_URL}'"
        )
    if not url.lower().startswith("http") and has_secret(url):
        raise InputError(
            f"{shown}: no user, password or query belongs into the address of a bucket; credentials"
            " come from the environment (AWS_ACCESS_KEY_ID, GOOGLE_SERVICE_ACCOUNT, ...)"
        )
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/"), fragment=""))


def _web_request(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL without user and password, and the headers that say these."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    name, _, password = user.partition(":")
    pair = base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()
    remember(url)
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {pair}"}


@functools.lru_cache(maxsize=64)
def _object_store(url: str) -> Any:
    """Return the obstore store of a URL; one per URL, so that connections are reused."""
    from obstore.exceptions import BaseError
    from obstore.store import HTTPStore, from_url

    options: Any = {}
    if url.startswith("http://") or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        # An address without TLS was asked for by name; obstore wants it said twice.
        options["allow_http"] = True
    open_store: Any = from_url
    if url.startswith("http") and has_secret(url):
        # By the name of its host, obstore would take it for a bucket with credentials elsewhere.
        open_store = HTTPStore.from_url
        url, headers = _web_request(url)
        options["default_headers"] = headers
    try:
        return open_store(url, client_options=options, retry_config={"max_retries": 3})
    except (BaseError, ValueError) as error:
        reason = hide(error)
        raise InputError(f"{RemoteLocation(url).text}: not a usable address ({reason})") from None

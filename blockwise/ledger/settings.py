"""Where the database is, and how its password stays out of every message."""

import os
import re
from pathlib import Path
from typing import Any, Final, Self

from pydantic import Field, SecretStr

from agq.credentials import HIDDEN, hide_address, secrets_of
from agq.errors import InputError
from agq.owners import warn_of_readers
from agq.paths import expanded
from agq.reading import read_file
from agq.settings import Settings

#: Environment variable with the URI, used when the settings have none.
URI_VARIABLE: Final = "AGQ_MONGO_URI"
#: Environment variable with the database's name, for commands that have no settings.
DATABASE_VARIABLE: Final = "AGQ_MONGO_DATABASE"

_MOST_BYTES: Final = 2**16
_SCHEME: Final = re.compile(r"^\s*(mongodb(?:\+srv)?://)(.*)$", re.DOTALL)
_SECRET_KEY: Final = re.compile(
    r"pass(word|wd|phrase)?$|secret|token$|credential|api_?key|access_?key|^uri$", re.IGNORECASE
)


class LedgerError(InputError):
    """The database cannot be used; the message is one line and has no password in it."""


class LedgerSettings(Settings):
    """Where block progress is mirrored: a MongoDB database.

    The URI is taken from `uri`, else from the file `uri_file`, else from the environment variable
    ``AGQ_MONGO_URI``; without any of them there is no ledger.
    """

    uri: SecretStr | None = None
    """MongoDB URI; better kept in uri_file or the environment."""
    uri_file: Path | None = None
    """File whose only line is the URI; readable by its owner only."""
    database: str = "agq"
    """Database; many runs and users may share one."""
    required: bool = False
    """Refuse to start when the database cannot be reached or written to at the start."""
    timeout_s: float = Field(5.0, gt=0)
    """Seconds to wait for the database before trying again later."""
    keep_days: float | None = Field(None, gt=0)
    """Delete your own runs from the database, not from disk, that rest: no stage runs, and nothing
    came from them for so many days. Checked when a command on another run starts."""
    interval_s: float = Field(1.0, gt=0)
    """Seconds between two deliveries of new journal lines."""

    @classmethod
    def of_environment(cls) -> Self:
        """Return what the environment alone says, for commands without a configuration."""
        name = os.environ.get(DATABASE_VARIABLE)
        return cls(database=name) if name else cls()

    @property
    def asked_for(self) -> bool:
        """Whether a database is named anywhere, or required."""
        named = self.uri or self.uri_file or os.environ.get(URI_VARIABLE)
        return self.required or bool(named)

    def resolve(self) -> SecretStr | None:
        """Return the URI from wherever it is, or None where none is given.

        Raises
        ------
        LedgerError
            If `uri_file` cannot be read or is empty, or the text is no MongoDB URI.
        """
        if self.uri is not None:
            text, where = self.uri.get_secret_value(), "ledger.uri"
        elif self.uri_file is not None:
            where = f"ledger.uri_file {self.uri_file}"
            try:
                text = read_file(expanded(self.uri_file), most=_MOST_BYTES).decode()
                warn_of_readers(expanded(self.uri_file), "ledger.uri_file")
            except (OSError, UnicodeDecodeError, InputError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not a text file"
                raise LedgerError(f"{where}: {reason}") from None
        elif os.environ.get(URI_VARIABLE):
            text, where = os.environ[URI_VARIABLE], f"environment variable {URI_VARIABLE}"
        else:
            return None
        text = text.strip()
        if not _SCHEME.match(text) or len(text.split()) != 1:
            raise LedgerError(f"{where}: not a MongoDB URI (mongodb://user:password@host:port/)")
        return SecretStr(text)


def shown_uri(uri: str) -> str:
    """Return the URI as people may see it: no password, no options.

    Parameters
    ----------
    uri : str
        Any text; one that is no URI is hidden altogether.
    """
    match = _SCHEME.match(uri.strip())
    if match is None:
        return HIDDEN
    # The last @ ends the user info even where someone forgot to escape one in the password.
    user, at, rest = match[2].rpartition("@")
    hosts = re.split(r"[/?]", rest, maxsplit=1)[0]
    name, colon, _ = user.partition(":")
    return f"{match[1]}{name}{colon and ':' + HIDDEN}{at}{hosts}"


class Secrets:
    """The secret parts of a URI, to take them out of other people's messages."""

    def __init__(self, uri: str) -> None:
        self._shown = shown_uri(uri)
        secrets = {uri.strip(), *secrets_of(uri.strip())}
        # Longest first: a part of a secret must not break up the whole of it.
        self._parts = sorted(secrets, key=len, reverse=True)

    def hide(self, text: object) -> str:
        """Return one line of the text with every secret replaced."""
        line = " ".join(str(text).split())
        for part in self._parts:
            line = line.replace(part, self._shown if "://" in part else HIDDEN)
        return line


def mask_secrets(value: Any) -> Any:
    """Copy a JSON-like value with passwords hidden and in a form that any MongoDB stores.

    Values of keys that name a secret become ``***``, and so do passwords, queries and fragments in
    addresses (`agq.credentials`). Keys lose dots and a leading dollar; numbers beyond 64 bits,
    paths and other objects become text.
    """
    if isinstance(value, dict):
        return {
            _key(k): HIDDEN if _SECRET_KEY.search(str(k)) and v else mask_secrets(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple | set):
        return [mask_secrets(v) for v in value]
    if isinstance(value, bool | float) or value is None:
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, SecretStr):
        return HIDDEN
    return hide_address(storable(str(value)))


def storable(text: str) -> str:
    """Replace what UTF-8 cannot hold (lone surrogates of undecodable file names)."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{SYMBOL FOR NULL}")


def _key(key: object) -> str:
    text = storable(str(key)).replace(".", "_")
    return "_" + text[1:] if text.startswith("$") else text

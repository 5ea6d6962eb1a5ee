"""Passwords, tokens and signatures in addresses: what records, messages and logs show of them.

An address may hold a user and a password (``https://user:password@host/``), or a query or fragment
that gives access (a signed URL). Others see ``https://user:***@host/volume.zarr?***`` of it.
"""

import base64
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus

from agq import waiting
from agq.plain_text import printable

HIDDEN: Final = "***"

_PORT: Final = r"(?!\d{1,5}(?:[/?#\s\"'<>]|$))"
_LONGEST: Final = 4096
"""Characters of an address that is looked at: longer ones would take quadratic time."""

# One slash is what a path makes of two.
_MARK: Final = ":/{1,2}"
# A password ends at the last @, even where someone forgot to escape one in it.
_USERINFO: Final = tuple(
    (re.compile(pattern, re.DOTALL), shown)
    for pattern, shown in (
        (rf"(mongodb(?:\+srv)?{_MARK}[^/:@?#]+):.+@", rf"\1:{HIDDEN}@"),
        (rf"({_MARK}[^/:@?#]+):{_PORT}.+@", rf"\1:{HIDDEN}@"),
        (rf"({_MARK})(?::{_PORT}.+|[^/:@?#]+:)@", rf"\1{HIDDEN}@"),
        # A name alone is a token, but in the URI of a database.
        (rf"(?<!mongodb)(?<!mongodb\+srv)({_MARK})[^/:@?#]+@", rf"\1{HIDDEN}@"),
    )
)
_QUERY: Final = re.compile(rf"({_MARK}[^\s\"'<>`?#]+)[?#][^\s\"'<>`]+")
_PARAMETER: Final = re.compile(
    r"([?&][\w.%-]{0,99}(?:sig|signature|token|credential|password|secret|key)=)[^&\s\"'<>`]+",
    re.IGNORECASE,
)
_END: Final = ":;,.)]}"
"""What follows an address in a sentence, and is not of it."""

_PASSWORD: Final = re.compile(rf"[^:]*{_MARK}([^/:@?#]*):{_PORT}(.*)@(.*)", re.DOTALL)
_TOKEN: Final = re.compile(rf"[^:]*{_MARK}()([^/:@?#]+)@(.*)", re.DOTALL)
_SHORTEST: Final = 6
"""Characters of a secret that is looked for by itself; shorter ones are common words."""
_LONG_PATH: Final = 16
"""Characters of a part of a path that may be a secret by itself."""

_VARIABLE: Final = re.compile(r"\$\{\w+(?::-([^}]*))?\}")

_known: set[str] = set()


def hide_address(address: str) -> str:
    """Return an address without password, query and fragment; another text as `hide` does."""
    if not is_address(address):
        return hide(address)
    return re.sub(r"[?#].+", f"?{HIDDEN}", _without_userinfo(address), flags=re.DOTALL)


def hide(text: object) -> str:
    """Return a text without the passwords, queries and fragments of the addresses in it.

    What `remember` was told is hidden wherever it is, also apart from its address.
    """
    line = str(text)
    # Longest first: a part of a secret must not break up the whole of it.
    for part in sorted(_known, key=len, reverse=True):
        line = line.replace(part, HIDDEN)
    if ":/" in line:
        line = re.sub(r"\S+", _without_secrets, line)
    return _PARAMETER.sub(rf"\1{HIDDEN}", line) if "=" in line else line


def _without_secrets(match: re.Match[str]) -> str:
    word = match[0]
    return _QUERY.sub(_without_query, _without_userinfo(word)) if ":/" in word else word


def _without_userinfo(text: str) -> str:
    if len(text) > _LONGEST:
        before, mark, _ = text.partition(":/")
        return before + mark + HIDDEN
    for pattern, shown in _USERINFO:
        text = pattern.sub(shown, text)
    return text


def _without_query(match: re.Match[str]) -> str:
    whole = match[0]
    return f"{match[1]}?{HIDDEN}{whole[len(whole.rstrip(_END)) :]}"


def hidden(values: Any) -> Any:
    """Return a copy of plain data (JSON types) whose texts have gone through `hide_address`."""
    return each_text(values, hide_address)


def each_text(values: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of plain data (JSON types) whose texts are changed; keys stay."""
    if isinstance(values, str):
        return change(values)
    if isinstance(values, dict):
        return {name: each_text(value, change) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [each_text(value, change) for value in values]
    return values


def texts_of(values: Any) -> Iterator[str]:
    """Yield the texts of plain data (JSON types), without keys."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from texts_of(value)


def is_address(text: str) -> bool:
    """Tell whether a text begins as an address does."""
    return re.match(rf"\s*\w[\w+.-]{{0,40}}{_MARK}", text) is not None


def has_secret(text: str) -> bool:
    """Tell whether an address holds what others must not see."""
    return is_address(text) and hide_address(text) != text


def secrets_of(address: str) -> set[str]:
    """Return the secret parts of an address, in all forms in which a message may hold them."""
    match = _PASSWORD.match(address) or _TOKEN.match(address)
    database = address.lstrip().startswith("mongodb")
    rest = address if match is None else match[3]
    found: set[str] = set()
    if match is not None and (match.re is _PASSWORD or not database):
        found.add(match[2] or match[1])
        if HIDDEN not in match[2]:
            both = f"{unquote(match[1])}:{unquote(match[2])}".encode(errors="replace")
            found.add(base64.b64encode(both).decode())
    marked = re.search(r"[?#](.+)", rest, re.DOTALL)
    for name, value in parse_qsl(marked[1].replace("#", "&")) if marked else ():
        # Of a database's options most are none, and messages name them.
        if re.search("password|prop", name, re.IGNORECASE) or (
            not database and len(value) >= _SHORTEST
        ):
            found.add(value)
    if marked and not database and len(marked[1]) >= _SHORTEST:
        found.add(marked[1])
    found = {part for part in found if HIDDEN not in part}
    for part in list(found):
        plain = unquote_plus(part)
        found |= {plain, quote(plain, safe=""), quote_plus(plain), repr(plain)[1:-1]}
    return found - {""}


def visible_secret(word: str) -> str | None:
    """Return why a word of a command line must not be there, and the way to give it; or None.

    Other users of the machine can read command lines. ``${NAME}`` in a word shows them nothing.
    """
    given = _VARIABLE.sub(lambda match: match[1] or HIDDEN, word)
    if not is_address(given):
        return None
    if given.lstrip().startswith("mongodb") and (given == word or secrets_of(given)):
        return (
            "other users of this machine can read command lines; write the URI into a file that "
            "only you can read (chmod 600) and name it in ledger.uri_file, or put it into the "
            "environment variable AGQ_MONGO_URI"
        )
    if not secrets_of(given):
        return None
    return (
        "other users of this machine can read the secret of an address in a command line; put the "
        "address into an environment variable, for example RAW_URL, and write '${RAW_URL}' instead"
    )


def remember(values: Any) -> None:
    """Let `hide` know the secret parts of all addresses in plain data, from now on."""
    for text in texts_of(values):
        if has_secret(text):
            # A short word (the name of a user without password) would hide half of every message.
            _known.update(
                part
                for part in secrets_of(text)
                if len(part) >= _SHORTEST or (len(part) > 3 and not part.isalpha())
            )


def remember_path(address: str) -> None:
    """Let `hide` know an address whose path is a secret too, as that of a webhook is."""
    remember(address)
    place = address.partition("://")[2].rpartition("@")[2]
    _known.update(
        part
        for part in (place, *re.split(r"[/?#]", place)[1:])
        # Not a common word, which would hide half of every message.
        if len(part) >= _LONG_PATH and part != place.partition("/")[0]
    )


class HidingFormatter(logging.Formatter):
    """Formats log lines, and tracebacks below them, without secrets and as plain text."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        waiting.over()
        return printable(hide(super().format(record)))


def log_to_stderr(format: str = "%(asctime)s %(levelname)s %(message)s") -> None:
    """Log from INFO on to stderr, and print uncaught errors there, without secrets of addresses."""
    handler = logging.StreamHandler()
    handler.setFormatter(HidingFormatter(format))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    hide_uncaught()
    threading.excepthook = _uncaught_in_thread


def hide_uncaught() -> None:
    """Print an error that ends this process without secrets of addresses."""
    sys.excepthook = _uncaught


def _uncaught(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    sys.stderr.write(printable(hide("".join(traceback.format_exception(kind, error, trace)))))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        _uncaught(args.exc_type, args.exc_value, args.exc_traceback)

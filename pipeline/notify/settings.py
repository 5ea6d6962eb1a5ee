"""Whom to tell of the end, the failure or the standstill of a run."""

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, SecretStr

from agq.credentials import remember_path
from agq.errors import InputError
from agq.owners import warn_of_readers
from agq.paths import expanded
from agq.reading import read_file
from agq.settings import Settings

Event = Literal["end", "failure", "stall"]

_MOST_BYTES = 4096


def _word(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("an argument of a command has characters, and no zero among them")
    return value


def _words(value: object) -> object:
    if isinstance(value, str):
        raise ValueError("a list of a program and its arguments, such as [mail, -s, agq, me]")
    return value


def _address(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("not an address such as https://host/path, in ASCII, without spaces")
    return value


class NotifySettings(Settings):
    """Whom to tell when a run ends, fails or stands still; without this section nobody is told.

    A run never waits for it longer than its time limits, and never fails by it.
    """

    command: Annotated[
        tuple[Annotated[str, AfterValidator(_word)], ...], BeforeValidator(_words)
    ] = ()
    """A program and its arguments. It gets what happened as JSON on standard input, and each field
    of it in the environment as `AGQ_NOTIFY_` and its name."""

    webhook: Annotated[SecretStr, AfterValidator(_address)] | None = None
    """Address, http or https, that the JSON is sent to (POST), hidden everywhere like a password.
    In `'${NAME}'` it comes from the environment."""

    webhook_file: Path | None = None
    """File whose only line is that address; readable by its owner only."""

    events: tuple[Event, ...] = ("end", "failure", "stall")
    """Of what."""

    stall_minutes: PositiveFloat = 60.0
    """A run stands still when for so long no block has been done and no step has moved."""

    timeout_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    """Seconds that the command has, and each of the three tries of the webhook."""

    def address(self) -> str | None:
        """Return the address of the webhook; messages hide it from now on.

        Raises
        ------
        InputError
            If its file cannot be read, or holds no address.
        """
        text = self.webhook.get_secret_value() if self.webhook is not None else None
        if text is None and self.webhook_file is not None:
            file, where = expanded(self.webhook_file), f"notify.webhook_file {self.webhook_file}"
            try:
                text = read_file(file, most=_MOST_BYTES).decode().strip()
                _address(SecretStr(text))
            except OSError as error:
                raise InputError(f"{where}: {error.strerror}") from None
            except ValueError as error:
                raise InputError(f"{where}: {error}") from None
            warn_of_readers(file, "notify.webhook_file")
        if text is not None:
            remember_path(text)
        return text

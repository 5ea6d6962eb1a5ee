"""Send a message: to a command, and to a webhook; each way ends after its time limit."""

import base64
import os
import queue
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException
from typing import Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit

from agq.blockwise.threads import start_aside
from agq.credentials import hide
from agq.errors import InputError
from agq.pipeline.notify.message import Message
from agq.pipeline.notify.settings import NotifySettings
from agq.pipeline.status.notices import Way
from agq.plain_text import printable

_TRIES: Final = 3
_PAUSE_S: Final = 1.0
_SAID_BYTES: Final = 300
_TRY_AGAIN: Final = (408, 429)


def ways(settings: NotifySettings) -> list[Way]:
    """Return by which ways the settings tell somebody."""
    found: list[Way] = ["command"] if settings.command else []
    if settings.webhook is not None or settings.webhook_file is not None:
        found.append("webhook")
    return found


def deliver(settings: NotifySettings, way: Way, message: Message) -> str | None:
    """Send a message by one way; return in one line why that failed, None if it did not."""
    body = message.model_dump_json().encode()
    if way == "command":
        facts = {
            f"AGQ_NOTIFY_{name.upper()}": "" if value is None else str(value)
            for name, value in message.model_dump().items()
        }
        problem = _run(settings.command, body, facts, settings.timeout_s)
    else:
        try:
            address = settings.address()
        except InputError as error:
            return hide(error)
        assert address is not None
        problem = _post(address, body, settings.timeout_s)
    return None if problem is None else printable(hide(" ".join(problem.split())))


def _run(
    command: Sequence[str], body: bytes, facts: dict[str, str], timeout_s: float
) -> str | None:
    with tempfile.TemporaryFile() as said:
        try:
            # A session of its own: what it starts is killed with it.
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env={**os.environ, **facts},
                start_new_session=True,
            )
        except OSError as error:
            return f"{command[0]} cannot be run: {error.strerror}"
        try:
            child.communicate(body, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"{command[0]} was killed after {timeout_s:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.returncode == 0:
            return None
        said.seek(max(0, said.tell() - _SAID_BYTES))
        words = said.read().decode(errors="replace")
        return f"{command[0]} ended with status {child.returncode}: {words}"


def _post(address: str, body: bytes, timeout_s: float) -> str | None:
    """Send by POST; try again what may pass: no answer, or an error of the server."""
    request = _request(address, body)
    problem: str | None = None
    for attempt in range(_TRIES):
        time.sleep(attempt * _PAUSE_S)
        # A thread, since the limit of a socket begins anew with every byte, and names are looked
        # up without one.
        answers: queue.SimpleQueue[tuple[str | None, bool]] = queue.SimpleQueue()
        start_aside("notify", lambda to=answers: to.put(_try(request, timeout_s)))
        try:
            problem, again = answers.get(timeout=timeout_s)
        except queue.Empty:
            problem, again = _late(timeout_s), True
        if not again:
            break
    return problem and f"{request.host}: {problem}"


def _late(timeout_s: float) -> str:
    return f"no answer within {timeout_s:g} s"


def _request(address: str, body: bytes) -> urllib.request.Request:
    parts = urlsplit(address)
    headers = {"Content-Type": "application/json", "User-Agent": "agq"}
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    host = parts.netloc.rpartition("@")[2]
    plain = urlunsplit(parts._replace(netloc=host, fragment=""))
    return urllib.request.Request(plain, body, headers, method="POST")  # noqa: S310 - see settings


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no other address: it would get what this one is told."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _try(request: urllib.request.Request, timeout_s: float) -> tuple[str | None, bool]:
    """Return what went wrong, if anything, and whether to try again."""
    try:
        opener = urllib.request.build_opener(_NoRedirect)
        opener.open(request, timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        error.close()
        return f"answered with status {error.code}", error.code >= 500 or error.code in _TRY_AGAIN
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            return _late(timeout_s), True
        return str(getattr(error.reason, "strerror", None) or error.reason), True
    except TimeoutError:
        return _late(timeout_s), True
    except (OSError, HTTPException) as error:
        return str(getattr(error, "strerror", None) or error or type(error).__name__), True
    except ValueError as error:
        return str(error), False
    return None, False

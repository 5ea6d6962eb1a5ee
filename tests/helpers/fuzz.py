"""Damage to files, and readers that must answer it with one line, soon, in little memory.

A test has a fixed seed and a small number of cases. ``make fuzz`` runs the same for
``AGQ_FUZZ_SECONDS`` each, with other seeds.
"""

import copy
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from agq.errors import InputError

SECONDS = float(os.environ.get("AGQ_FUZZ_SECONDS", 0))
"""How long each reader is attacked; 0: a small number of cases."""

CASE_SECONDS = 20
"""Longer than any case may take, on a machine that does other things too."""

MEMORY = 2**31
"""Bytes that a case may ask for, however large the file says its contents are."""

LONGEST_LINE = 4000
"""Characters of a message that is still a line to read."""


def _nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -0.0, 1, -1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, -(2**63) - 1),
    *(10**30, 10**400, 1e308, 1e-308, 0.1, float("nan"), float("inf"), -float("inf")),
    *("", "0", "-1", "1e400", "nan", "\0", "..", "../../../etc/passwd", "/dev/zero", "a/" * 300),
    *("\ud800", "\x1b[31m", "\u202e", "x" * 5000, "1" * 5000, "uint8", "float16", "|O", "<U9"),
    *([], {}, [[]], [0, 0, 0], [-1, -1, -1], [10**12] * 3, [2**62] * 3, ["a"] * 3, [None] * 3),
    *([1] * 5000, [1, 1, 1, 1], {"": ""}, {"a": {"a": {}}}, _nested(60), _nested(200)),
)
"""Values that a field may have and should not."""


def odd_value(rng: random.Random) -> Any:
    """Return one of `ODD`, or a list of three of them."""
    if rng.random() < 0.2:
        return [copy.deepcopy(rng.choice(ODD)) for _ in range(3)]
    return copy.deepcopy(rng.choice(ODD))


def _places(document: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in a document."""
    if above:
        yield above
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _places(value, (*above, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from _places(value, (*above, index))


def odd_document(rng: random.Random, document: Any) -> Any:
    """Return a document of JSON types with one to three wrong values, keys or lengths."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if not places or rng.random() < 0.02:
            return odd_value(rng)
        *above, last = rng.choice(places)
        node = document
        for part in above:
            node = node[part]
        kind = rng.random()
        if kind < 0.7:
            node[last] = odd_value(rng)
        elif kind < 0.85:
            del node[last]
        elif isinstance(node, list):
            node.insert(last, copy.deepcopy(rng.choice((node[last], odd_value(rng)))))
        elif kind < 0.92:
            node[rng.choice(("", "a", "\0", str(last).upper()))] = node.pop(last)
        else:  # what another field has
            other: Any = document
            for part in rng.choice(places):
                try:
                    other = other[part]
                except (KeyError, IndexError, TypeError):
                    break
            node[last] = copy.deepcopy(other)
    return document


def odd_json(rng: random.Random, document: Any) -> bytes:
    """Return the text of a document, with wrong values or damaged."""
    text = json.dumps(odd_document(rng, document)).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        text = odd_bytes(rng, text)
    elif rng.random() < 0.05:  # a key twice
        text = text.replace(b"{", b"{" + text[1 : text.find(b",")] + b",", 1)
    return text


def odd_text(rng: random.Random, text: bytes) -> bytes:
    """Return a text with words replaced and lines doubled, lost or out of order; or damaged."""
    if rng.random() < 0.3:
        return odd_bytes(rng, text)
    lines = text.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(lines))
        kind = rng.randrange(4)
        if kind == 0:
            words = lines[place].split(b" ")
            odd = str(odd_value(rng)).encode("utf-8", "surrogatepass")
            words[rng.randrange(len(words))] = odd
            lines[place] = b" ".join(words)
        elif kind == 1:
            lines.insert(place, rng.choice(lines))
        elif kind == 2 and len(lines) > 1:
            del lines[place]
        else:
            rng.shuffle(lines)
    return b"\n".join(lines)


def odd_bytes(rng: random.Random, data: bytes, head: int | None = None) -> bytes:
    """Return bytes with some flipped, overwritten, cut off, lost or doubled.

    Most files say what they hold in their first or last bytes: `head` limits the damage to the
    first of them.
    """
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        end = min(len(changed), head or len(changed))
        if not end:
            break
        place = rng.randrange(end)
        kind = rng.randrange(7)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, *b'"{}[]-.,:9e\n\0'))
        elif kind == 2:  # a number of a header
            width = rng.choice((2, 4, 8))
            number = rng.choice((0, 1, -1, 1 << (8 * width - 2), (1 << (8 * width - 1)) - 1))
            value = number.to_bytes(width, rng.choice(("little", "big")), signed=True)
            changed[place : place + width] = value
        elif kind == 3 and rng.random() < 0.3:
            del changed[place:]
        elif kind == 4:
            del changed[place : place + rng.choice((1, 2, 4, 64))]
        elif kind == 5:
            changed[place:place] = changed[place : place + rng.choice((1, 4, 64))]
        else:
            changed[place:place] = rng.randbytes(rng.choice((1, 4, 16)))
    return bytes(changed)


class TookTooLongError(Exception):
    """A case did not end in time."""


@contextmanager
def bounds(seconds: float = CASE_SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Let what runs in the block take only so long, and ask for only so much memory."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TookTooLongError

    status = Path("/proc/self/statm").read_text(encoding="ascii")
    used = int(status.split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def require_one_line(read: Callable[[], object], *allowed: type[Exception]) -> str:
    """Check that a reader ends well, or in one line for people; return the line or ""."""
    line = ""
    try:
        with bounds():
            read()
    except (InputError, *allowed) as error:
        line = str(error).strip() or f"{type(error).__name__} without a word\n"
    assert len(line) <= LONGEST_LINE, f"{len(line)} characters: {line[:200]}"
    assert "\n" not in line, line
    return line


def attack(
    read: Callable[[Any], object],
    make: Callable[[random.Random], Any],
    cases: int,
    allowed: Sequence[type[Exception]] = (),
) -> int:
    """Give a reader wrong input and check what it says.

    Parameters
    ----------
    read
        Called with a case.
    make
        Makes a case with a random generator.
    cases
        How many, with fixed seeds; with ``AGQ_FUZZ_SECONDS`` as many as there is time for.
    allowed
        Exceptions besides `InputError` that the commands tell in one line too.

    Returns
    -------
    int
        How many cases the reader refused.
    """
    refused, number = 0, 0
    end = time.monotonic() + SECONDS
    while number < cases or time.monotonic() < end:
        case = make(random.Random(number))
        try:
            refused += bool(require_one_line(lambda c=case: read(c), *allowed))  # type: ignore[misc]
        except BaseException as error:
            shown = repr(case)
            error.add_note(f"case {number}: {shown[:1000]}")
            raise
        number += 1
    return refused

"""The journal of a stage that has ended, in one file instead of one a process."""

import re
from pathlib import Path
from typing import Final

from agq.blockwise.journal.reader import compact
from agq.blockwise.journal.snapshot import SNAPSHOT, open_snapshot
from agq.blockwise.journal.tail import PACKED, JournalTail
from agq.blockwise.storage.files import atomic_file, fsync_path
from agq.reading import open_file

_TOKEN: Final = re.compile(rb'"token":"([^"]*)"')
_EXIT: Final = b'{"event":"exit"'


def pack_journal(folder: Path) -> int:
    """Put all lines of a journal folder into one file; no process may work on the stage.

    What the lines say stays as it is. The file appears whole, and then the others go. Cut off
    between, lines are there twice, which changes nothing of what is done (contract 3 of
    `journal.writer`), and the next call leaves out what the file has: a process is known by its
    token. A process that writes nevertheless finds that its file is gone, and ends.

    Parameters
    ----------
    folder : Path
        ``<run>/journal/<stage>``.

    Returns
    -------
    int
        Files that went into the one.

    Raises
    ------
    OSError
        If a file cannot be read or written.
    """
    names = [name for name in JournalTail(folder).files() if name != PACKED]
    snapshot = open_snapshot(folder)
    # It alone knows what the lines of a file that is gone said.
    if not names or (snapshot and not all((folder / f).exists() for f in snapshot.meta.files)):
        return 0
    # Its positions are those of files that go.
    (folder / SNAPSHOT).unlink(missing_ok=True)
    packed = folder / PACKED
    known: set[bytes] = set()
    # At the end: a reader opens no file again in which it has met one.
    exits: list[bytes] = []
    with atomic_file(packed) as out:
        for path in ([packed] if packed.exists() else []) + [folder / name for name in names]:
            tokens: set[bytes] = set()
            with open_file(path) as file:
                for line in file:
                    found = _TOKEN.search(line)
                    token = found[1] if found else b""
                    tokens.add(token)
                    # A last line without its end says nothing.
                    if (token and token in known) or not line.endswith(b"\n"):
                        continue
                    if line.startswith(_EXIT):
                        exits.append(line)
                    else:
                        out.write(line)
            known |= tokens
        out.writelines(exits)
    for name in names:
        (folder / name).unlink()
    fsync_path(folder)
    compact(folder)
    return len(names)

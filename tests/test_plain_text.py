"""What a terminal would obey is written out, and nothing else changes."""

import io
import json

import pytest
from rich.table import Table
from rich.text import Text

from agq.plain_text import printable
from agq.terminal import WholeTable, console

OBEYED = "".join(map(chr, (*range(10), *range(11, 32), *range(127, 160))))
TURNED = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_every_control_is_written_out_and_other_text_stays() -> None:
    for character in OBEYED + TURNED:
        expected = "    " if character == "\t" else f"\\u{ord(character):04x}"
        assert printable(f"a{character}b") == f"a{expected}b"
    plain = "Zürich  日本\n\N{GREEK SMALL LETTER MU}m [bold] \\ é"
    assert printable(plain) == plain
    assert printable("a\nb", lines=False) == r"a\nb"
    # JSON stays JSON and says the same.
    data = {"x": OBEYED.replace("\t", "") + TURNED}
    for ascii_only in (True, False):
        assert json.loads(printable(json.dumps(data, ensure_ascii=ascii_only))) == data


@pytest.mark.parametrize("terminal", [False, True])
def test_consoles_write_out_what_is_foreign_and_keep_their_own(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1" if terminal else "", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    out = console()
    out.file = io.StringIO()
    table = WholeTable(f"title{OBEYED}", ("a\x1b[2J",), legend="legend\x9b")
    table.add_row(f"cell{OBEYED}", style="red")
    table.add_row(Text(f"text{TURNED}", "bold"))
    nested = Table("b\x1b[2J")
    nested.add_row("c\x1b[2J")
    for item in (table, nested, "words\x1b[2J [red]not markup[/red] :smile:", f"{TURNED}"):
        out.print(item)
    written = out.file.getvalue()
    assert "\x1b[2J" not in written
    assert not set(written) & set(OBEYED + TURNED) - {"\x1b"}
    assert ("\x1b" in written) == terminal
    assert written.count(r"\u001b[2J") >= 2
    assert "[red]not markup[/red] :smile:" in written

"""What a command works on is shown on a terminal, and goes away with its output."""

import os
import pty
import sys
import time

from agq import waiting
from agq.plain_text import say


def test_a_line_on_a_terminal_that_output_takes_away(monkeypatch):
    """It comes after a moment, with the seconds, and only while nothing is printed."""
    parent, child = pty.openpty()
    with os.fdopen(child, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(waiting, "_SOON_S", 0.05)
        with waiting.switched_on():
            waiting.doing("loading libraries")
            text = os.read(parent, 1000).decode()
            say("wrote it", err=True)
            monkeypatch.setattr(waiting, "_SOON_S", 60.0)
            waiting.doing("a short thing")
            say("and this", err=True)
        text += os.read(parent, 10_000).decode()
    os.close(parent)
    assert "loading libraries ... " in text
    assert "\r\x1b[2Kwrote it" in text
    assert "a short thing" not in text
    assert text.endswith("and this\r\n")


def test_nothing_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(waiting, "_SOON_S", 0.0)
    with waiting.switched_on():
        waiting.doing("loading libraries")
        time.sleep(0.1)
    waiting.doing("not a command")
    assert capsys.readouterr().err == ""


def test_bars_show_it_instead():
    class Bars:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def set(self, text: str) -> None:
            self.texts.append(text)

    bars = Bars()
    with waiting.shown_by(bars):
        waiting.doing("starting processes")
        waiting.over()
    waiting.doing("later")
    assert bars.texts == ["starting processes", ""]

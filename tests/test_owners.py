"""Whose files are trusted."""

import os
from pathlib import Path

import pytest

from agq.errors import InputError
from agq.owners import TRUSTED_VARIABLE, stranger, trusted_uids

OTHER = 54321


def test_you_and_root_are_trusted_and_whom_you_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUSTED_VARIABLE, raising=False)
    assert trusted_uids() == {0, os.geteuid()}
    monkeypatch.setenv(TRUSTED_VARIABLE, f" {OTHER}, root ,,")
    assert trusted_uids() == {0, os.geteuid(), OTHER}
    for wrong in ("no-such-user", "-1", "1.5", "\N{SUPERSCRIPT TWO}", "a\0b"):
        monkeypatch.setattr(os, "environ", {TRUSTED_VARIABLE: wrong})
        with pytest.raises(InputError, match=TRUSTED_VARIABLE):
            trusted_uids()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_of_what_a_link_leads_to_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRUSTED_VARIABLE, raising=False)
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    assert stranger(folder, link, tmp_path / "nothing") is None
    os.chown(folder, OTHER, OTHER)
    assert stranger(tmp_path, link) == f"uid {OTHER}"
    os.chown(folder, 65534, 65534)
    assert stranger(folder) == "nobody (uid 65534)"
    # Whoever owns the folder that the user has named is trusted too, and nobody else.
    inner = folder / "inner"
    inner.mkdir()
    os.chown(inner, OTHER, OTHER)
    assert stranger(folder, like=folder) is None
    assert stranger(inner, like=folder) == f"uid {OTHER}"
    monkeypatch.setenv(TRUSTED_VARIABLE, "nobody")
    assert stranger(folder) is None

"""A copied folder is told from one that was moved, linked or mounted elsewhere."""

import shutil
import socket
import subprocess

import pytest

from agq.blockwise.storage.place import is_copy, place_of


@pytest.fixture
def folder(tmp_path):
    """A folder with the file that is never replaced, and what it is."""
    made = tmp_path / "run"
    made.mkdir()
    (made / ".lock").touch()
    (made / "id").write_text("a")
    return made


def copied(folder, recorded):
    def holds_the_same(other):
        return (other / "id").exists() and (other / "id").read_text() == "a"

    return is_copy(folder, folder / ".lock", recorded, holds_the_same)


def test_where_it_was_it_is_no_copy(folder):
    assert not copied(folder, place_of(folder, folder / ".lock"))


@pytest.mark.parametrize("how", ["cp -a", "cp -r", "cp -al", "cp -a --reflink=auto"])
def test_a_copy_beside_its_original(folder, tmp_path, how):
    recorded = place_of(folder, folder / ".lock")
    subprocess.run([*how.split(), folder, tmp_path / "other"], check=True)
    assert copied(tmp_path / "other", recorded)
    assert not copied(folder, recorded)
    # Of an earlier release only the path is known.
    assert copied(tmp_path / "other", {"path": str(folder)})


def test_a_move_or_another_name_is_no_copy(folder, tmp_path, monkeypatch):
    recorded = place_of(folder, folder / ".lock")
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert not copied(link, recorded)
    moved = folder.rename(tmp_path / "moved")
    assert not copied(moved, recorded)
    # To another file system, that is, copied and deleted; by `mv` on this machine.
    again = tmp_path / "again"
    shutil.copytree(moved, again)
    shutil.rmtree(moved)
    assert not copied(again, recorded)
    # A requeued coordinator sees the same folder on another node.
    monkeypatch.setattr(socket, "gethostname", lambda: "other")
    assert not copied(again, place_of(again, again / ".lock") | {"host": "first"})


def test_a_copy_on_another_machine(folder, tmp_path, monkeypatch):
    """The original cannot be seen there; the same path is taken for the same storage."""
    recorded = place_of(folder, folder / ".lock")
    shutil.copytree(folder, tmp_path / "other")
    monkeypatch.setattr(socket, "gethostname", lambda: "other")
    shutil.rmtree(folder)
    assert copied(tmp_path / "other", recorded)
    (tmp_path / "other").rename(folder)
    assert not copied(folder, recorded)


def test_a_folder_without_the_file_at_first_is_known_on_another_node(folder, monkeypatch, tmp_path):
    (folder / ".lock").unlink()
    recorded = place_of(folder, folder / ".lock")
    (folder / ".lock").touch()
    monkeypatch.setattr(socket, "gethostname", lambda: "other")
    assert not copied(folder, recorded)
    assert not copied(folder.rename(tmp_path / "mounted"), recorded)

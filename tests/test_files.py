"""Files and folders are written whole; faults of the disk are told with the name of the file that was written."""

import errno
import os
from pathlib import Path

import pytest

from tailseg.errors import UserError
from tailseg.files import new_folder, write_whole, writing


def test_a_fault_without_a_name_gets_one_and_others_keep_theirs(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, writing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as caught, writing(tmp_path / "a"):
        (tmp_path / "b" / "c").write_text("")
    assert caught.value.filename == str(tmp_path / "b" / "c")


def test_a_file_is_written_whole(tmp_path):
    write_whole(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"
    (tmp_path / "link.txt").symlink_to("a.txt")
    write_whole(tmp_path / "link.txt", b"new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "a.txt").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "link.txt"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.txt", "old")
    write_bytes = Path.write_bytes

    def full(path, content):
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(tmp_path / "a.txt", "a longer one")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.txt"))
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_cannot_be_written_is_named(tmp_path):
    for path, fault in ((tmp_path / "no" / "a.txt", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(fault) as caught:
            write_whole(path, "x")
        assert caught.value.filename == str(path)
    write_whole(Path(os.devnull), "x")
    assert not Path(os.devnull).is_file()


def test_a_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
        assert folder.parent.parent == out.parent  # on the same file system, so that it can be moved
    assert (out / "a").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]


def test_an_interruption_leaves_nothing_behind(tmp_path):
    def interrupted():
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:  # may be there already
        (folder / "a").touch()
    (tmp_path / "file").touch()
    for out in (tmp_path / "empty", tmp_path / "file"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=f"^{out} is there already and is not empty; name a new folder or remove"):
            new_folder(out).__enter__()
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(
        UserError, match=rf"^no folder can be made at {tmp_path / 'file/out'}: .*; choose another place"
    ):
        new_folder(tmp_path / "file" / "out").__enter__()

"""Faults of the disk are told with the name of the file that was written."""

import errno
import os
from pathlib import Path

import pytest

from tailseg.errors import write_whole, writing


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

"""Faults of the disk are told with the name of the file that was written."""

import errno

import pytest

from tailseg.errors import writing


def test_a_fault_without_a_name_gets_one_and_others_keep_theirs(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, writing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as caught, writing(tmp_path / "a"):
        (tmp_path / "b" / "c").write_text("")
    assert caught.value.filename == str(tmp_path / "b" / "c")

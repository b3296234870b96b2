import gzip

import pytest

from tailseg.data.annotations import packed
from tailseg.data.annotations.packed import open_unpacked
from tailseg.data.annotations.streaming import read_lists
from tailseg.data.importers.foreign import read_object
from tailseg.errors import UserError
from tailseg.evaluation.reading import Cut, read_results


def test_packed_or_not_and_whatever_its_name(tmp_path):
    for name, content in (("a.json", b"plain"), ("b.gz", b"plain"), ("c.json", gzip.compress(b"plain")), ("d", b"")):
        (tmp_path / name).write_bytes(content)
        with open_unpacked(tmp_path / name) as file:
            assert file.read(2) + file.read() == (b"plain" if content else b"")
    assert file.closed


@pytest.fixture
def small_bounds(monkeypatch):
    monkeypatch.setattr(packed, "FREE", 10_000)


@pytest.mark.parametrize("at_once", [1, 3000, 10**9, -1])
def test_bounds(tmp_path, small_bounds, at_once):
    def unpacked(content: bytes) -> int:
        (tmp_path / "a.gz").write_bytes(gzip.compress(content))
        count = 0
        with open_unpacked(tmp_path / "a.gz") as file:
            while block := file.read(at_once):
                count += len(block)
        return count

    assert unpacked(b" " * 10_000) == 10_000  # about 400 times, but small
    with pytest.raises(UserError, match=r"a\.gz: unpacks to more than 0 MB, over 200 times its size"):
        unpacked(b" " * 10_001)
    noise = b"".join(b"%d," % (i * 7919 % 10_007) for i in range(10_007))
    assert unpacked(noise) == len(noise)


def test_every_reader_has_the_bounds(tmp_path, small_bounds):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"images": [' + b" " * 20_000 + b"]}"))
    with pytest.raises(UserError, match="unpacks to more than"):
        list(read_lists(path, ("images",)))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_object(path)
    path.write_bytes(gzip.compress(b"[" + b" " * 20_000 + b"]"))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_results(path, "a.json.gz", None, (), Cut())


def test_read_object_unpacks(tmp_path):
    (tmp_path / "a.json").write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}'))
    assert read_object(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_bytes(gzip.compress(b'{"a": 1}')[:-9])
    with pytest.raises(UserError, match=r"a\.json: not a whole gzip file"):
        read_object(tmp_path / "a.json")

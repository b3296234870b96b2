import json
import logging
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.annotations import cache as store
from tailseg.data.annotations.annotations import load_annotations
from tailseg.errors import UserError

BOX = {"bbox": [10, 10, 20, 20], "area": 400}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, which files of any size go to; the annotation file is not young."""
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SMALLEST", 0)
    monkeypatch.setattr(store, "_SETTLED", -1)
    return tmp_path / "cache" / "annotations"


def content(count=5, x=10):
    images = [{"id": i, "height": 40, "width": 50, "file_name": f"é{i}.jpg"} for i in (5, 1)]
    images[0] |= {"neg_category_ids": [2, 9], "coco_url": "http://a/b.jpg"}
    polygon = [[x, 10, 30, 10, 30, 30], [1, 2, 3, 4.25, 5, 6]]
    row = {"image_id": 5, "category_id": 2, **BOX, "segmentation": polygon}
    rows = [row | {"id": i, "image_id": (5, 1)[i % 2]} for i in range(1, count + 1)]
    rows[1] |= {"segmentation": {"size": [40, 50], "counts": [100, 50, 1850]}, "category_id": 4}
    return {"images": images, "annotations": rows, "categories": [{"id": i, "name": f"c{i}"} for i in (9, 2, 4)]}


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def everything(data):
    """All that `Annotations` says, as plain values."""
    return {
        "categories": data.categories,
        "report": data.report,
        "images": list(
            zip(data.image_ids, data.file_names, data.coco_urls, map(list, data.neg_category_ids), strict=True)
        ),
        "sizes": data.image_sizes.tolist(),
        "rows": [data.rows(i).tolist() for i in range(len(data))],
        "columns": [getattr(data, k).tolist() for k in ("annotation_ids", "labels", "boxes", "areas", "crowd")],
        "masks": [s if isinstance(s, bytes) else [p.tolist() for p in s] for s in data.segmentations],
    }


def no_parsing(path):
    raise AssertionError(f"{path} is parsed again")


def test_the_cache_gives_what_the_file_gives(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.json", content())
    first = load_annotations(path, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(store, "parse", no_parsing)
        again = load_annotations(path, tmp_path)
    assert again.cache is not None
    assert not again.boxes.flags.writeable
    monkeypatch.setattr(store, "SMALLEST", 1 << 30)
    plain = load_annotations(path, tmp_path)  # small: parsed, in memory
    assert plain.cache is None
    assert everything(first) == everything(again) == everything(plain)
    assert everything(again)["images"] == [(5, "é5.jpg", "http://a/b.jpg", [2, 9]), (1, "é1.jpg", None, [])]
    assert everything(again)["masks"][1] == [[10, 10, 30, 10, 30, 30], [1, 2, 3, 4.25, 5, 6]]
    assert sorted(p.suffix for p in cache.iterdir()) == [".columns", ".stamp"]


def test_no_annotations_at_all(tmp_path):
    path = write(tmp_path / "a.json", content() | {"annotations": []})
    load_annotations(path, tmp_path)
    data = load_annotations(path, tmp_path)
    assert data.cache is not None
    assert data.boxes.shape == (0, 4)
    assert len(data.segmentations) == 0


def test_a_copy_shares_the_cache_and_a_change_does_not(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", content())
    data = load_annotations(path, tmp_path)
    copy = tmp_path / "b.json"
    copy.write_bytes(path.read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr(store, "parse", no_parsing)
        assert load_annotations(copy, tmp_path).cache == data.cache
    status = path.stat()
    write(path, content(x=11))  # as long as before, and dated back
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = load_annotations(path, tmp_path)
    assert changed.cache != data.cache
    assert changed.segmentation(1)[0][0] == 11
    assert data.segmentation(1)[0][0] == 10  # still open


def test_a_young_file_is_not_remembered_by_its_times(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(store, "_SETTLED", 60)
    load_annotations(write(tmp_path / "a.json", content()), tmp_path)
    assert [p.suffix for p in cache.iterdir()] == [".columns"]


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "magic", "zeros", "flip", "longer", "stamp"])
def test_a_damaged_cache_is_made_anew(tmp_path, cache, damage):
    path = write(tmp_path / "a.json", content(50))
    expected = everything(load_annotations(path, tmp_path))
    file = next(cache.glob("*.columns"))
    good = file.read_bytes()
    middle = len(good) - 700
    bad = {
        "empty": b"",
        "cut": good[:-64],
        "header": good.replace(b'"bytes"', b'"byte5"'),
        "magic": b"x" + good[1:],
        "zeros": good[:middle] + bytes(700),
        "flip": good[:middle] + bytes([good[middle] ^ 4]) + good[middle + 1 :],
        "longer": good + bytes(64),
        "stamp": good,
    }[damage]
    assert (bad == good) == (damage == "stamp")
    file.unlink()  # not written over: the columns are mapped
    file.write_bytes(bad)
    if damage == "stamp":
        next(cache.glob("*.stamp")).write_bytes(b'{"key": "../../x"')
    again = load_annotations(path, tmp_path)
    assert everything(again) == expected
    assert file.read_bytes() == good
    assert not list(cache.glob("*.tmp"))


def exchanged(good, first, second, size):
    """The bytes of ``good`` with two stretches of ``size`` at the places ``first`` and ``second`` exchanged."""
    bad = bytearray(good)
    bad[first : first + size], bad[second : second + size] = good[second : second + size], good[first : first + size]
    return bytes(bad)


@pytest.mark.parametrize("size", [8, 64])
def test_columns_with_two_places_exchanged_are_not_opened(tmp_path, cache, size):
    load_annotations(write(tmp_path / "a.json", content(600)), tmp_path)
    file = next(cache.glob("*.columns"))
    good = file.read_bytes()
    start = 32 + int.from_bytes(good[8:16], "little")
    rng = np.random.default_rng(0)
    tried = 0
    while tried < 100:
        bad = exchanged(good, *(rng.integers(-(-start // 64) * 64 // size, len(good) // size, 2) * size).tolist(), size)
        if bad != good:
            file.unlink()
            file.write_bytes(bad)
            with pytest.raises(store._NotUsableError, match="content has changed"):
                store._open(file)
            tried += 1


def test_columns_with_random_damage_are_refused_or_right(tmp_path, cache):
    expected = everything(load_annotations(write(tmp_path / "a.json", content(600)), tmp_path))
    file = next(cache.glob("*.columns"))
    good = file.read_bytes()
    rng = np.random.default_rng(1)
    for number in range(200):
        place, length = int(rng.integers(len(good))), int(rng.integers(1, 100))
        new = rng.bytes(length) if number % 2 else bytes(length)
        file.unlink()
        file.write_bytes((good[:place] + new + good[place + length :])[: len(good)])
        assert everything(load_annotations(tmp_path / "a.json", tmp_path)) == expected


@given(st.integers(0, 3 * 2**16 // 8), st.integers(0, 3 * 2**16 // 8), st.sampled_from([1, 1 << 31, 1 << 32, 1 << 63]))
def test_the_hash_depends_on_the_place(first, second, bits):
    """Also where the two numbers stand in one column of the rows, and differ in a single bit."""
    values = np.zeros(4 * 2**13, np.uint64)
    values[first] = bits
    moved = np.zeros_like(values)
    moved[second] = bits
    hashes = {store.hash_of(array.view(np.uint8)) for array in (values, moved, values | moved, np.zeros_like(values))}
    assert len(hashes) == (2 if first == second else 4)


def test_the_hash_below_and_beyond_a_row():
    values = (np.arange(2**16 + 100) % 255 + 1).astype(np.uint8)
    hashes = [store.hash_of(values[:n]) for n in (0, 1, 2, 63, 64, 65, 2**16 - 1, 2**16, 2**16 + 1, 2**16 + 100)]
    assert len(set(hashes)) == len(hashes)
    assert store.hash_of(np.append(values, np.zeros(28, np.uint8))) == hashes[-1]


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, cache, caplog):
    path = write(tmp_path / "a.json", content())
    cache.parent.write_text("a file stands where the folder should be")
    with caplog.at_level(logging.WARNING):
        data = load_annotations(path, tmp_path)
    assert data.cache is None
    assert len(data.labels) == 5
    assert len(caplog.records) == 1
    assert "cannot be cached there" in caplog.text


def test_a_full_disk_leaves_nothing_behind(tmp_path, cache, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Path, "replace", full)
    data = load_annotations(write(tmp_path / "a.json", content()), tmp_path)
    assert data.cache is None
    assert list(cache.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", content())

    def slow(path, parse=store.parse, **options):
        parsed = parse(path, **options)
        write(path, content(7))
        return parsed

    monkeypatch.setattr(store, "parse", slow)
    with pytest.raises(UserError, match=r"a\.json: the file changed while it was read"):
        load_annotations(path, tmp_path)


def test_faults_are_not_cached(tmp_path, cache):
    path = write(tmp_path / "a.json", content() | {"categories": [{"id": 1, "name": "x"}]})
    for _ in range(2):
        with pytest.raises(UserError, match="annotation 1: there is no category with the category_id 2"):
            load_annotations(path, tmp_path)
    assert not cache.exists()


def _load(path):
    store.SMALLEST, store._SETTLED = 0, -1
    return everything(load_annotations(path, path.parent))


def test_processes_that_start_at_once(tmp_path, cache):
    path = write(tmp_path / "a.json", content(3000))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_load, [path] * 8, chunksize=1)
    assert all(result == results[0] for result in results)
    assert sorted(p.suffix for p in cache.iterdir()) == [".columns", ".stamp"]
    assert everything(load_annotations(path, tmp_path)) == results[0]


def test_threads_read_one_cache(tmp_path):
    path = write(tmp_path / "a.json", content(300))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: everything(load_annotations(path, tmp_path)), range(8)))
    assert all(result == results[0] for result in results)


def test_pickled_columns_are_a_path(tmp_path):
    path = write(tmp_path / "a.json", content(3000))
    data = load_annotations(path, tmp_path)
    pickled = pickle.dumps(data)
    assert len(pickled) < 3000
    assert everything(pickle.loads(pickled)) == everything(data)
    data.cache.unlink()
    with pytest.raises(UserError, match="gone or broken; start again"):
        pickle.loads(pickled)


def test_in_memory_columns_survive_pickling(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SMALLEST", 1 << 30)
    data = load_annotations(write(tmp_path / "a.json", content()), tmp_path)
    assert everything(pickle.loads(pickle.dumps(data))) == everything(data)


def test_caches_that_nobody_uses_go(tmp_path, cache):
    cache.mkdir(parents=True)
    for name, days in (("old.columns", 31), ("piece.tmp", 40), ("new.columns", 29)):
        (cache / name).touch()
        os.utime(cache / name, (0, (cache / name).stat().st_mtime - days * 24 * 3600))
    load_annotations(write(tmp_path / "a.json", content()), tmp_path)
    assert {p.name for p in cache.iterdir() if p.suffix != ".stamp"} >= {"new.columns"}
    assert not (cache / "old.columns").exists()
    assert not (cache / "piece.tmp").exists()


def test_real_file_by_columns_equals_the_json(shared, tmp_path):
    """Every annotation of a real file, looked up through the cache, is the one that stands in the JSON."""
    path = shared / "data" / "lvis-val-100" / "lvis_val_100.json"
    load_annotations(path, Path())
    data = load_annotations(path, Path())
    assert data.cache is not None
    stated = {row["id"]: row for row in json.loads(path.read_text())["annotations"]}
    assert sorted(data.annotation_ids) == sorted(stated)
    for image in range(len(data)):
        for row in data.rows(image):
            of_file = stated[data.annotation_ids[row]]
            assert of_file["image_id"] == data.image_ids[image]
            assert of_file["category_id"] == data.label_to_category_id[data.labels[row]]
            assert [polygon.tolist() for polygon in data.segmentation(row)] == of_file["segmentation"]
            assert data.boxes_xywh[row].tolist() == of_file["bbox"]
            assert data.areas[row] == of_file["area"]

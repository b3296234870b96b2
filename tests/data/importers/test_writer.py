import json
import os
from pathlib import Path

import pytest
from foreign_files import picture
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.importers.writer import Part, new_names, require_inside, write_parts
from tailseg.errors import UserError

CATEGORIES = [{"id": 3, "name": "cat", "synset": "cat.n.01"}, {"id": 8, "name": "owl"}]


def part_of(root, *names, annotations=()):
    images = [{"id": i, "file_name": name, "height": 40, "width": 80} for i, name in enumerate(names)]
    return Part(images, [picture(root / name) for name in names], list(annotations))


def row(image, category, **changes):
    return {"image_id": image, "category_id": category} | changes


def test_both_splits(tmp_path):
    annotations = [row(image, 3) for image in range(11)] + [row(0, 3), row(1, 8, iscrowd=1)]
    train = part_of(tmp_path / "src", *(f"train/{i}.jpg" for i in range(11)), annotations=annotations)
    val = part_of(tmp_path / "src", "val/a.jpg", annotations=[row(0, 8)])
    done = []
    assert write_parts(tmp_path / "out", CATEGORIES, {"train": train, "val": val}, done.append)
    assert done == list(range(1, 13))
    assert sorted(os.listdir(tmp_path / "out")) == ["images", "train.json", "val.json"]
    content = json.loads((tmp_path / "out/train.json").read_text())
    assert content == {"images": train.images, "annotations": annotations, "categories": CATEGORIES}
    assert json.loads((tmp_path / "out/val.json").read_text())["categories"] == CATEGORIES
    assert os.path.samefile(tmp_path / "out/images/train/3.jpg", tmp_path / "src/train/3.jpg")


def test_groups_and_counts_of_the_source_are_left_out(tmp_path):
    """They are of other images than those of the new training split."""
    stale = [{**category, "frequency": "f", "image_count": 900, "instance_count": 2000} for category in CATEGORIES]
    write_parts(tmp_path / "out", stale, {"train": part_of(tmp_path, "a.jpg")})
    assert json.loads((tmp_path / "out/train.json").read_text())["categories"] == CATEGORIES
    assert stale[0]["frequency"] == "f"


def test_a_set_without_annotations(tmp_path):
    write_parts(tmp_path / "out", CATEGORIES, {"train": part_of(tmp_path, "a.jpg")})
    assert json.loads((tmp_path / "out/train.json").read_text())["annotations"] == []


def test_a_link_of_the_source_becomes_its_file(tmp_path):
    part = part_of(tmp_path / "src", "a.jpg")
    (tmp_path / "src" / "b.jpg").symlink_to("a.jpg")
    part.files[0] = tmp_path / "src" / "b.jpg"
    assert write_parts(tmp_path / "out", CATEGORIES, {"train": part})
    assert not (tmp_path / "out/images/a.jpg").is_symlink()
    assert os.path.samefile(tmp_path / "out/images/a.jpg", tmp_path / "src/a.jpg")


def test_the_same_picture_in_both_splits_is_placed_once(tmp_path):
    part = part_of(tmp_path / "src", "a.jpg")
    assert write_parts(tmp_path / "out", CATEGORIES, {"train": part, "val": part})
    assert os.listdir(tmp_path / "out" / "images") == ["a.jpg"]


def test_after_one_failed_link_all_are_copies(tmp_path, monkeypatch):
    tries = []

    def refuse(*arguments):
        tries.append(arguments)
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    part = part_of(tmp_path / "src", "a.jpg", "b.jpg")
    assert not write_parts(tmp_path / "out", CATEGORIES, {"train": part})
    assert len(tries) == 1
    for name in ("a.jpg", "b.jpg"):
        copy, source = tmp_path / "out/images" / name, tmp_path / "src" / name
        assert copy.read_bytes() == source.read_bytes()
        assert not os.path.samefile(copy, source)


def test_an_image_without_file_is_read_when_it_is_written(tmp_path):
    part = part_of(tmp_path / "src", "a.jpg", "b.jpg")
    part.files[1] = lambda: b"pixels"
    assert write_parts(tmp_path / "out", CATEGORIES, {"train": part})
    assert (tmp_path / "out/images/b.jpg").read_bytes() == b"pixels"


@pytest.mark.parametrize("missing", ["image", "category"])
def test_a_failure_leaves_nothing_behind(tmp_path, missing):
    part = part_of(tmp_path / "src", "a.jpg", "b.jpg", annotations=[row(0, 3)])
    if missing == "image":
        part.files[1].unlink()
    categories = CATEGORIES if missing == "image" else [{"id": 3, "name": {"no JSON"}}]
    with pytest.raises((OSError, TypeError)):
        write_parts(tmp_path / "out", categories, {"train": part})
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ([], []),
        (["a.jpg", "images/train/b.jpg"], ["a.jpg", "train/b.jpg"]),
        (["train/images/a.jpg", "valid/images/a.jpg"], ["train/a.jpg", "valid/a.jpg"]),
        (["JPEGImages/a.jpg"], ["a.jpg"]),
        (["images/a.jpg", "a.jpg"], ["images/a.jpg", "a.jpg"]),  # two files would have one name
        (["images/a.jpg", "images/a.jpg"], ["a.jpg", "a.jpg"]),  # the same file twice has one
        (["Images/a.jpg"], ["Images/a.jpg"]),
    ],
)
def test_names_in_the_new_folder(files, names):
    assert new_names([Path("/root") / name for name in files], Path("/root")) == names


folders = st.lists(st.sampled_from(["images", "JPEGImages", "a", "b"]), max_size=3)
paths = st.lists(st.builds(lambda parts, name: "/".join([*parts, name]), folders, st.sampled_from(["x.jpg", "y.jpg"])))


@given(paths)
def test_different_files_get_different_names(files):
    names = new_names([Path("/root") / name for name in files], Path("/root"))
    assert len(set(zip(files, names, strict=True))) == len(set(files)) == len(set(names))
    assert all(not name.startswith("/") and ".." not in name for name in names)


def test_only_what_lies_inside_is_taken(tmp_path):
    root = tmp_path / "root"
    picture(root / "a" / "b.jpg")
    picture(tmp_path / "c.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "c.jpg")
    (root / "up").symlink_to(tmp_path)
    (root / "in.jpg").symlink_to("a/b.jpg")
    (tmp_path / "root2").mkdir()
    for path in (root, root / "a" / "b.jpg", root / "in.jpg", root / "a" / ".." / "x", root / "not there"):
        assert require_inside(path, root, "w") == path
    for path in (root / "link.jpg", root / "up" / "c.jpg", root / ".." / "c.jpg", tmp_path / "root2", Path("/etc")):
        with pytest.raises(UserError) as caught:
            require_inside(path, root, "f.txt: line 3")
        assert str(caught.value) == f"f.txt: line 3: {path} leads out of {root}; put the file itself there"
    (tmp_path / "linked").symlink_to(root)
    assert require_inside(tmp_path / "linked" / "a" / "b.jpg", tmp_path / "linked", "w")

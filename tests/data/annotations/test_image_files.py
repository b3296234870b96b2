import os
from contextlib import suppress

import pytest
from annotation_files import content, load
from hypothesis import given
from hypothesis import strategies as st

from tailseg.data.annotations.image_files import (
    FileTree,
    ImageFolder,
    alike,
    candidate_names,
    files_below,
    is_hidden,
    parts_below,
)
from tailseg.errors import UserError


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"file_name": "a.jpg"}, "a.jpg"),
        ({"file_name": "deep/a.jpg"}, "deep/a.jpg"),
        ({"file_name": "a.jpg"}, "val2017/a.jpg"),
        ({"coco_url": "http://images/train2017/a.jpg"}, "a.jpg"),
        ({"coco_url": "http://images/train2017/a.jpg"}, "train2017/a.jpg"),
        ({"file_name": "gone.jpg", "coco_url": "http://images/test2017/a.jpg"}, "test2017/a.jpg"),
        ({"file_name": "COCO_train2014_000000000009.jpg"}, "train2017/000000000009.jpg"),
        ({"file_name": "COCO_val2014_000000000009.jpg"}, "COCO_val2014_000000000009.jpg"),
        ({"file_name": "images/a.jpg"}, "a.jpg"),  # from the annotation file's folder
        ({"file_name": "images\\deep\\a.jpg"}, "deep/a.jpg"),
        ({"file_name": "images/a.jpg"}, "images/a.jpg"),
        ({"file_name": "a%20b.jpg"}, "a b.jpg"),
    ],
)
def test_images_are_found(tmp_path, entry, place):
    path = tmp_path / "images" / place
    path.parent.mkdir(parents=True)
    path.touch()
    data = load(tmp_path, content([], images=[{"id": 1, "height": 4, "width": 5, **entry}]))
    data.check_images()
    assert data.image_path(0) == path


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "deep/../../secret.jpg", "..\\secret.jpg", "C:/x.jpg", "..%2Fsecret.jpg"]
)
def test_names_that_climb_out_are_refused(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").touch()
    data = load(tmp_path, content([], images=[{"id": 1, "height": 4, "width": 5, "file_name": name}]))
    with pytest.raises(UserError, match="image 1 leads out of the image folder"):
        data.image_path(0)


def test_links_may_not_lead_out_but_folders_may_be_links(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "store" / "sub").mkdir(parents=True)
    for name in ("secret.jpg", "store/5.jpg", "store/sub/1.jpg"):
        (tmp_path / name).touch()
    os.symlink(tmp_path / "secret.jpg", tmp_path / "images" / "1.jpg")
    os.symlink(tmp_path / "store", tmp_path / "images" / "train2017")
    data = load(tmp_path)
    assert data.image_path(0) == tmp_path / "images" / "train2017" / "5.jpg"
    with pytest.raises(UserError, match=r"image 1: .*1\.jpg is a link that leads out"):
        data.image_path(1)
    os.symlink(tmp_path, tmp_path / "images" / "up")
    nested = content([], images=[{"id": 1, "height": 4, "width": 5, "file_name": "up/secret.jpg"}])
    with pytest.raises(UserError, match="is a link that leads out"):
        load(tmp_path, nested).image_path(0)


@pytest.mark.parametrize(
    ("file_name", "coco_url", "names"),
    [
        (None, None, []),
        ("", "", []),
        ("a.jpg", None, ["a.jpg"]),
        ("COCO_val2014_000000000009.jpg", None, ["COCO_val2014_000000000009.jpg", "000000000009.jpg"]),  # LVIS v0.5
        ("sub/COCO_test2014_000000000009.jpg", None, ["sub/COCO_test2014_000000000009.jpg", "000000000009.jpg"]),
        ("COCO_val2014_9.jpg", None, ["COCO_val2014_9.jpg"]),
        ("COCO_val2014_000000000009.png", None, ["COCO_val2014_000000000009.png"]),
        (None, "http://images/train2017/a.jpg", ["a.jpg", "train2017/a.jpg"]),  # LVIS v1
        (None, "a.jpg", ["a.jpg", "a.jpg"]),
        ("b.jpg", "http://x/val2017/a.jpg", ["b.jpg", "a.jpg", "val2017/a.jpg"]),
        ("a%20b/c%25.jpg", None, ["a%20b/c%25.jpg", "a b/c%.jpg"]),  # Label Studio
        ("s3://x/y/a%20b.jpg?c=1/2", None, ["s3://x/y/a%20b.jpg?c=1/2", "a b.jpg", "y/a b.jpg"]),
        (None, "http://x/y/a.jpg?c=1/2", ["a.jpg", "y/a.jpg"]),
        ("/data/local-files/?d=a%20b.jpg", None, ["/data/local-files/?d=a%20b.jpg", "a b.jpg"]),
        ("http://h:80/data/local-files/?d=x/a.jpg", None, ["http://h:80/data/local-files/?d=x/a.jpg", "x/a.jpg"]),
    ],
)
def test_names_that_an_image_may_have(file_name, coco_url, names):
    assert candidate_names(file_name, coco_url) == names


def folder_of(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return ImageFolder(root)


def test_the_first_name_and_the_upper_folder_come_first(tmp_path):
    folder = folder_of(tmp_path, "b.jpg", "train2017/a.jpg", "val2017/a.jpg", "val2017/c.jpg", "deep/er/d.jpg")
    assert folder.find(["a.jpg", "b.jpg"], "w") == tmp_path / "train2017/a.jpg"
    assert folder.find(["x.jpg", "b.jpg"], "w") == tmp_path / "b.jpg"
    assert folder.find(["c.jpg"], "w") == tmp_path / "val2017/c.jpg"
    assert folder.find(["deep/er/d.jpg"], "w") == tmp_path / "deep/er/d.jpg"
    assert folder.find(["val2017/c.jpg"], "w") == tmp_path / "val2017/c.jpg"
    for names in ([], ["x.jpg"], ["d.jpg"], ["deep/er"], ["deep/x.jpg"]):
        assert folder.find(names, "w") is None


def test_a_folder_that_is_not_there_or_empty_has_nothing(tmp_path):
    for folder in (ImageFolder(tmp_path / "gone"), ImageFolder(tmp_path)):
        assert folder.find(["a.jpg", "train2017/a.jpg"], "w") is None


def test_a_folder_is_listed_once(tmp_path):
    folder = folder_of(tmp_path, "a.jpg")
    assert folder.find(["b.jpg"], "w") is None
    (tmp_path / "b.jpg").touch()
    assert folder.find(["b.jpg"], "w") is None
    assert ImageFolder(tmp_path).find(["b.jpg"], "w") == tmp_path / "b.jpg"


def test_links_within_the_folder_are_followed(tmp_path):
    root = tmp_path / "images"
    folder = folder_of(root, "real/a.jpg", "train2017/b.jpg")
    os.symlink("real/a.jpg", root / "a.jpg")
    os.symlink(root / "real", root / "other")
    os.symlink("../train2017/b.jpg", root / "real" / "b.jpg")
    assert folder.find(["a.jpg"], "w") == root / "a.jpg"
    assert folder.find(["other/a.jpg"], "w") == root / "other/a.jpg"
    assert folder.find(["real/b.jpg"], "w") == root / "real/b.jpg"


def test_a_linked_folder_of_images_is_the_root(tmp_path):
    folder_of(tmp_path / "store", "a.jpg")
    os.symlink(tmp_path / "store", tmp_path / "images")
    assert ImageFolder(tmp_path / "images").find(["a.jpg"], "w") == tmp_path / "images/a.jpg"


@pytest.mark.parametrize("name", ["..", "../a", "a/../../b", "a\\..\\..\\b", "/a", "\\\\host\\a", "c:a", "Z:\\a"])
def test_no_name_climbs_out_even_if_an_earlier_one_is_not_there(tmp_path, name):
    with pytest.raises(UserError) as caught:
        ImageFolder(tmp_path).find(["x.jpg", name], "f.json: image 3")
    expected = f"f.json: image 3 leads out of the image folder ({name!r}); give a path inside of it"
    assert str(caught.value) == expected


@given(st.builds("".join, st.lists(st.sampled_from(["a", "..", ".", "/", "\\", "up", "out", ":"]), max_size=7)))
def test_what_is_found_lies_inside_whatever_the_name(tmp_path_factory, name):
    root = tmp_path_factory.mktemp("set") / "images"
    folder = folder_of(root, "a", "b/a")
    folder_of(root.parent, "secret", "a")
    os.symlink(root.parent, root / "up")
    os.symlink(root.parent / "secret", root / "out")
    with suppress(UserError):
        found = folder.find([name], "w")
        assert found is None or found.resolve().is_relative_to(root.resolve())


@pytest.mark.parametrize(
    ("name", "base", "parts"),
    [
        ("a.jpg", "", ("a.jpg",)),
        ("./a.jpg", "", ("a.jpg",)),
        ("photos\\b//c.jpg", "", ("photos", "b", "c.jpg")),
        ("../photos/a.jpg", "labels", ("photos", "a.jpg")),
        ("..\\photos\\a.jpg", "labels", ("photos", "a.jpg")),
        ("../set/a.jpg", "", ("a.jpg",)),  # out of the root and back
        ("../../set/labels/a.jpg", "labels", ("labels", "a.jpg")),
        ("{root}/x/a.jpg", "labels", ("x", "a.jpg")),
        ("../a.jpg", "", None),
        ("../settle/a.jpg", "", None),
        ("/etc/passwd", "labels", None),
        ("C:\\a.jpg", "", None),
        ("labels/..", "", None),
        (".", "", None),
        ("", "", None),
    ],
)
def test_the_path_that_a_name_stands_for(tmp_path, name, base, parts):
    root = tmp_path / "set"
    assert parts_below(root, name.format(root=root), root / base) == parts


def test_names_match_whatever_their_unicode_form_and_the_case_of_the_suffix(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    folder = folder_of(tmp_path, f"{decomposed}/a.JPG", "b.jpeg", "B.JPEG", "c.Png", "c.PNG", "d.jpg")
    assert folder.find([f"{composed}/a.jpg"], "w") == tmp_path / decomposed / "a.JPG"
    assert folder.find(["b.jpeg"], "w") == tmp_path / "b.jpeg"
    assert folder.find(["b.JPEG"], "w") == tmp_path / "b.jpeg"
    assert folder.find(["c.png"], "w") is None  # either could be meant
    assert folder.find(["D.jpg"], "w") is None  # the case of the name itself counts
    assert alike(f"{composed}.JPG") == alike(f"{decomposed}.jpg")
    assert alike("A.jpg") != alike("a.jpg")


def test_neither_a_folder_nor_a_link_to_nothing_is_an_image(tmp_path):
    folder = folder_of(tmp_path, "a.jpg/b.jpg", "c.jpg")
    os.symlink("gone.jpg", tmp_path / "d.jpg")
    assert folder.find(["a.jpg"], "w") is None
    assert folder.find(["c.jpg/b.jpg"], "w") is None
    assert folder.find(["d.jpg"], "w") is None
    assert folder.find(["n" * 5000 + ".jpg", "\0"], "w") is None


def test_a_tree_finds_names_from_the_folder_of_the_file_that_states_them(tmp_path):
    folder_of(tmp_path, "photos/a.jpg", "labels/b.jpg")
    tree = FileTree(tmp_path)
    assert tree.find("../photos/a.jpg", "w", tmp_path / "labels") == tmp_path / "photos/a.jpg"
    assert tree.find("b.jpg", "w", tmp_path / "labels") == tmp_path / "labels/b.jpg"
    assert tree.find("a.jpg", "w", tmp_path / "labels") is None
    assert tree.at(("photos", "a.JPG"), "w") == tmp_path / "photos/a.jpg"


def test_hidden_files_are_no_data(tmp_path):
    names = ("a.jpg", "b/c.JPG", "._a.jpg", ".ipynb_checkpoints/a.jpg", "__MACOSX/b/._c.jpg", "b/d.txt", "Thumbs.db")
    folder_of(tmp_path, *names)
    assert list(files_below(tmp_path, (".jpg",))) == [tmp_path / "a.jpg", tmp_path / "b/c.JPG"]
    assert [is_hidden(name) for name in ("._a.jpg", "__MACOSX", "Thumbs.db", "a.jpg")] == [True, True, True, False]


def test_links_to_themselves_are_neither_files_nor_folders(tmp_path):
    folder_of(tmp_path, "deep/a.jpg")
    os.symlink("self.jpg", tmp_path / "self.jpg")
    os.symlink(tmp_path / "deep", tmp_path / "deep" / "loop")
    assert list(files_below(tmp_path, (".jpg",))) == [tmp_path / "deep/a.jpg"]


def test_folders_beside_the_top_may_be_links_and_nothing_else(tmp_path):
    folder_of(tmp_path / "disk", "a.jpg", "deep/b.jpg")
    folder_of(tmp_path / "set", "labels/x.txt")
    os.symlink(tmp_path / "disk", tmp_path / "set" / "images")
    os.symlink(tmp_path / "disk", tmp_path / "set" / "labels" / "more")
    found = list(files_below(tmp_path / "set", (".jpg",)))
    assert found == [tmp_path / "set/images/a.jpg", tmp_path / "set/images/deep/b.jpg"]
    (tmp_path / "secret.jpg").touch()
    os.symlink(tmp_path / "secret.jpg", tmp_path / "set" / "labels" / "s.jpg")
    with pytest.raises(UserError, match="is a link that leads out"):
        list(files_below(tmp_path / "set", (".jpg",)))


def test_links_below_the_top_are_followed_where_they_stay_inside(tmp_path):
    root = tmp_path / "set"
    folder_of(root, "pool/a.jpg", "images/train/b.jpg")
    folder_of(tmp_path, "disk/one/c.jpg", "disk/all/x.txt", "secret/d.jpg")
    os.symlink("../pool", root / "images/val")
    os.symlink(tmp_path / "disk", root / "linked")
    os.symlink("../one", tmp_path / "disk/all/again")  # inside of what a link at the top leads to
    os.symlink(tmp_path / "secret", root / "images/secret")
    os.symlink(tmp_path, root / "images/up")
    os.symlink(tmp_path, root / "up")
    os.symlink(root, root / "images/train/loop")
    os.symlink("../pool", root / "pool/self")
    left = []
    found = [str(path.relative_to(root)) for path in files_below(root, (".jpg",), leave=left.append)]
    assert found == [
        "images/train/b.jpg",
        "images/val/a.jpg",
        "linked/all/again/c.jpg",
        "linked/one/c.jpg",
        "pool/a.jpg",
    ]
    assert sorted(left) == [root / "images/secret", root / "images/up", root / "up"]


def test_folders_that_link_to_each_other_end(tmp_path):
    names = [f"f{i}" for i in range(6)]
    folder_of(tmp_path, *(f"{name}/a.jpg" for name in names))
    for name in names:
        for other in names:
            os.symlink(f"../{other}", tmp_path / name / f"to_{other}")
    found = {path.resolve() for path in files_below(tmp_path, (".jpg",))}
    assert found == {tmp_path / name / "a.jpg" for name in names}
    assert len(list(files_below(tmp_path, (".jpg",)))) <= 6 + 30  # each link is followed once


def test_links_may_lead_anywhere_inside_a_wider_folder_that_is_named(tmp_path):
    root = tmp_path / "set"
    folder_of(root, "all/a.jpg", "train/b.jpg")
    os.symlink("../all/a.jpg", root / "train/a.jpg")
    with pytest.raises(UserError, match=rf"a\.jpg is a link that leads out of {root / 'train'}"):
        list(files_below(root / "train", (".jpg",)))
    os.symlink("../all", root / "train/more")
    found = list(files_below(root / "train", (".jpg",), inside=root))
    assert found == [root / "train/a.jpg", root / "train/b.jpg", root / "train/more/a.jpg"]
    folder_of(tmp_path, "disk/secret.jpg")
    os.symlink(tmp_path / "disk", root / "train/disk")
    with pytest.raises(UserError, match=rf"disk is a link that leads out of {root}; put the folder itself there"):
        list(files_below(root / "train", (".jpg",), inside=root))

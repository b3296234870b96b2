from io import BytesIO

import pytest
from foreign_files import picture
from PIL import Image

from tailseg.data.importers.foreign import AnnotatedImage, LeftOut
from tailseg.data.importers.source_images import SourceImages, recognised
from tailseg.errors import UserError


def content(size):
    stream = BytesIO()
    Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


def test_files_of_a_kind_and_others(tmp_path):
    found = LeftOut()
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    assert recognised(files, lambda path: path.name != "b", "files: left out", found) == [files[0], files[2]]
    assert found.notes() == [f"1 files: left out ({tmp_path}/b)"]
    assert recognised([], lambda path: True, "files", found) == []


def test_ways_to_find_an_image(tmp_path):
    for name in ("x/a.JPG", "y/a.jpg", "y/b.png", "y/b.jpg", "z/c.tif"):
        picture(tmp_path / name)
    images = SourceImages(tmp_path, LeftOut(), "files")
    x, y = tmp_path / "x", tmp_path / "y"
    assert images.stated("a.jpg", [x, y], "w") == x / "a.JPG"
    assert images.stated("../y/a.jpg", [x], "w") == y / "a.jpg"
    assert images.stated(str(y / "a.jpg"), [x], "w") == y / "a.jpg"
    assert [images.stated(name, [x], "w") for name in ("", ".", "..", "../../a.jpg", "/a.jpg", "C:\\a.jpg")] == [
        None
    ] * 6
    assert images.of_stem("b", [x, y]) == y / "b.jpg"
    assert images.of_stem("b", [x]) is None
    assert images.anywhere("C.TIF", tmp_path) is None  # case matters but for the suffix
    assert images.anywhere("c.TIF", tmp_path) == tmp_path / "z" / "c.tif"
    assert images.anywhere("a.jpg", tmp_path) is None  # there are two
    assert images.anywhere("home/y/a.jpg", tmp_path) == y / "a.jpg"
    assert images.anywhere("home/y/c", tmp_path) == tmp_path / "z" / "c.tif"
    assert images.anywhere("y/b", tmp_path) is None  # of two suffixes
    assert images.anywhere("", tmp_path) is None
    assert images.absence("a.jpg") == f"may be any of 2 files in {tmp_path}"
    assert images.absence("e.jpg") == f"is not in {tmp_path}"


@pytest.mark.parametrize(
    ("near", "expected"),
    [
        ("json/train", "images/train/a.jpg"),
        ("json/val/deep", None),
        ("json/deep/val", "images/val/a.jpg"),
        ("json", None),
        ("val/json", None),
        ("test/json", "test/images/a.jpg"),
    ],
)
def test_of_images_of_one_name_the_nearest_counts(tmp_path, near, expected):
    for name in ("images/train/a.jpg", "images/val/a.jpg", "test/images/a.jpg"):
        picture(tmp_path / name)
    found = SourceImages(tmp_path, LeftOut(), "files").anywhere("a.jpg", tmp_path / near)
    assert found == (tmp_path / expected if expected else None)


def test_each_image_is_used_once(tmp_path):
    path = picture(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    found = LeftOut()
    images = SourceImages(tmp_path, found, "files")
    assert not images.is_used(path)
    assert images.use(path, "one", None) == (40, 80)
    assert images.is_used(tmp_path / "b.jpg")
    assert images.use(tmp_path / "b.jpg", "two", None) is None
    assert images.use(tmp_path / "inside.png", "three", (9, 7), content((7, 9))) == (9, 7)
    assert found.notes() == ["1 files for an image that is used already: left out (two)"]


def test_links_to_folders_are_followed_inside_and_counted_where_they_lead_out(tmp_path):
    root = tmp_path / "set"
    picture(root / "pool" / "a.jpg")
    picture(tmp_path / "secret" / "b.jpg")
    (root / "images").mkdir()
    (root / "images" / "inner").symlink_to(root / "pool")
    (root / "images" / "outer").symlink_to(tmp_path / "secret")
    found = LeftOut()
    images = SourceImages(root, found, "files")
    assert images.anywhere("inner/a.jpg", root) == root / "images" / "inner" / "a.jpg"
    assert images.anywhere("b.jpg", root) is None
    images.use(root / "images" / "inner" / "a.jpg", "one", None)
    images.read([], lambda path: None)
    assert found.notes() == [f"1 links to folders outside of the source: not followed ({root}/images/outer)"]


def annotated(path, *names):
    return AnnotatedImage(path, (40, 80), list(names), [[] for _ in names])


@pytest.mark.parametrize("faults", [0, 1, 2, 3, 4])
def test_most_at_fault_is_an_error(tmp_path, faults):
    images = SourceImages(tmp_path, LeftOut(), "files")
    for number in range(4):
        picture(tmp_path / f"{number}.jpg")

    def reader(number):
        if number < faults:
            images.missing(f"place {number}: no image; put it there")
            return None
        path = tmp_path / f"{number}.jpg"
        images.use(path, str(number), None)
        return annotated(path, "cat")

    told = [(number, None) for number in range(4)]
    if faults <= 2:
        assert len(images.read(told, reader)["train"]) == 4 - faults
        return
    with pytest.raises(UserError) as caught:
        images.read(told, reader)
    assert str(caught.value) == f"place 0: no image; put it there ({faults} of 4 files are at fault)"


def test_images_by_split_and_what_is_odd_about_them(tmp_path):
    found = LeftOut()
    images = SourceImages(tmp_path, found, "files")
    for name in ("a", "b", "unused", "test/c", "d"):
        picture(tmp_path / f"{name}.jpg")

    def reader(name):
        path = tmp_path / f"{name}.jpg"
        images.use(path, name, None)
        return annotated(path, *(["cat"] if name == "a" else []))

    read = images.read([("a", "train"), ("b", "val"), ("test/c", "test"), ("d", "test")], reader)
    assert {split: [image.path.name for image in part] for split, part in read.items()} == {
        "train": ["a.jpg"],
        "val": ["b.jpg"],
    }
    assert found.notes() == [
        "2 files in neither the training nor the validation split: left out (test/c, d)",
        f"1 images without an object: kept, as images that show none of the classes ({tmp_path}/b.jpg)",
    ]
    assert SourceImages(tmp_path, LeftOut(), "files").read([], reader) == {"train": []}

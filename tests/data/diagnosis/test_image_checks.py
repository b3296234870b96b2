import json
import os

import numpy as np
import pytest
from checked_data import HEIGHT, SOUND, SOUND_VAL, WIDTH, finding, report, write
from PIL import Image

from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.diagnosis import image_checks
from tailseg.data.diagnosis.image_checks import (
    EDGE,
    FileFacts,
    file_facts,
    look_at_files,
    require_sound_files,
    same_content,
    steps,
)
from tailseg.data.images import ImageHeader
from tailseg.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, SOUND) / "images"


@pytest.fixture
def annotations(folder):
    """Four images of noise, 1.png to 4.png."""
    return load_annotations(folder.parent / "train.json", folder)


def replace(annotations, folder, name, **how):
    """Another picture for the first image, in a file of another name."""
    (folder / "1.png").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(folder / name, **how)
    os.rename(folder / name, folder / "1.png")
    return file_facts(annotations, 0)


def test_a_sound_file(annotations, folder):
    facts = file_facts(annotations, 2)
    assert (facts.path, facts.problem, facts.header) == (folder / "3.png", None, ImageHeader("PNG", (HEIGHT, WIDTH), 1))
    assert facts.complete
    assert len(facts.fingerprint) == 16


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_orientations(annotations, folder, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    facts = replace(annotations, folder, name, exif=exif)
    assert facts.problem is None
    assert facts.header.orientation == (orientation if 1 <= orientation <= 8 else 1)
    assert facts.header.stored_hw == (HEIGHT, WIDTH)
    assert facts.header.shown_hw == ((WIDTH, HEIGHT) if 5 <= orientation <= 8 else (HEIGHT, WIDTH))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif"])
def test_a_whole_file_is_complete(annotations, folder, name):
    assert replace(annotations, folder, name).complete


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_file_that_lacks_its_end(annotations, folder, name):
    """Its header is sound; only decoding, which such a file always gets, tells that it is broken."""
    assert replace(annotations, folder, name).complete
    content = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(content[: len(content) // 2])
    facts = file_facts(annotations, 0)
    assert (facts.problem, facts.complete, facts.header.stored_hw) == (None, False, (HEIGHT, WIDTH))


def test_files_that_are_missing_empty_or_no_images(annotations, folder):
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_text("hello\n")
    missing, empty, text = (file_facts(annotations, i) for i in range(3))
    assert missing.path is None
    assert "image 1: '1.png' is not in" in missing.problem
    assert empty.problem == f"{folder / '2.png'}: the file is empty; replace it by a JPEG or PNG file"
    assert text.problem == f"{folder / '3.png'}: not an image that can be read; replace it by a JPEG or PNG file"
    for facts in (missing, empty, text):
        assert "\n" not in facts.problem
        assert facts.fingerprint == b""


def test_doubtful_files_are_decoded_whatever_the_sample(annotations, folder, monkeypatch):
    content = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(content[:-300])
    (folder / "2.png").unlink()
    monkeypatch.setattr(image_checks, "DECODED", 0)
    advanced = []
    found = look_at_files(annotations, advanced.append)
    assert [facts.problem is None for facts in found] == [True, False, True, False]
    assert found[3].problem.startswith(f"{folder / '4.png'}: the image is broken")
    assert found[3].path == folder / "4.png"
    assert advanced == [1, 2, 3, 4, 5]  # four looked at, one decoded
    assert steps(annotations) == 4


def test_a_sample_is_decoded(annotations, folder):
    """Its end is there, but the pixels are not: nothing but decoding shows it."""
    content = bytearray((folder / "3.png").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    (folder / "3.png").write_bytes(content)
    advanced = []
    found = look_at_files(annotations, advanced.append)
    assert file_facts(annotations, 2).complete
    assert [facts.problem is None for facts in found] == [True, True, False, True]
    assert advanced == list(range(1, steps(annotations) + 1))


def test_sound_files_are_only_looked_at(annotations, folder, monkeypatch):
    replace(annotations, folder, "a.jpg")
    monkeypatch.setattr("tailseg.data.dataset.to_rgb", None)  # no pixel is decoded
    advanced = []
    require_sound_files(annotations, advance=advanced.append)
    assert advanced == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (lambda sound: b"", "the file is empty; replace it by a JPEG or PNG file"),
        (lambda sound: b"<html>", "not an image that can be read; replace it by a JPEG or PNG file"),
        (lambda sound: sound[:20], ""),
        (lambda sound: sound[:-300], "the image is broken or cut off"),
    ],
)
def test_a_file_that_training_cannot_read(annotations, folder, content, problem):
    path = folder / "3.png"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        require_sound_files(annotations)
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert "\n" not in str(caught.value)


def test_a_file_of_another_size(annotations, folder):
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(folder / "3.png")
    with pytest.raises(UserError) as caught:
        require_sound_files(annotations)
    assert str(caught.value) == (
        f"{folder / '3.png'}: the image is {WIDTH + 1} x {HEIGHT} pixels but {annotations.path} (image 3) says "
        f"{WIDTH} x {HEIGHT}; correct the entry or restore the image"
    )


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_images_may_be_annotated_either_way(annotations, folder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    replace(annotations, folder, "a.jpg", exif=exif)
    require_sound_files(annotations)
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "1.png", exif=exif)
    if orientation > 4:
        require_sound_files(annotations)
    else:
        with pytest.raises(UserError, match=f"the image is {HEIGHT} x {WIDTH} pixels"):
            require_sound_files(annotations)


def test_a_sample_of_the_files_is_always_the_same(annotations, folder):
    seen = set()
    for number in range(1, 5):
        path = folder / f"{number}.png"
        sound = path.read_bytes()
        path.write_bytes(b"")
        for _ in range(2):
            try:
                require_sound_files(annotations, at_most=2)
            except UserError:
                seen.add(number)
        path.write_bytes(sound)
    assert len(seen) == 2
    advanced = []
    require_sound_files(annotations, at_most=0, advance=advanced.append)
    assert advanced == []


def test_the_pixels_of_decoded_images(annotations, folder, monkeypatch):
    monkeypatch.setattr(image_checks, "DECODED", 2)
    content = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(content[:-300])
    Image.fromarray(np.array([[9, 9, 40]] * 30, np.uint8)).save(folder / "2.png")
    Image.fromarray(np.array([[0, 4095, 256]] * 30, np.uint16)).save(folder / "3.png")
    Image.fromarray(np.array([[0, 4095, 256]] * 30, np.int32)).save(folder / "4.png", "TIFF")
    monkeypatch.setattr(np.random, "default_rng", lambda _seed: Fixed())
    found = look_at_files(annotations, lambda _done: None)
    assert [facts.pixels is None for facts in found] == [True, False, False, True]  # broken, two of a sample, not in it
    assert [(found[i].pixels.levels, found[i].pixels.deep) for i in (1, 2)] == [(31, False), (15, True)]
    assert found[1].pixels.thumbnail.shape == (16, 18)
    monkeypatch.setattr(image_checks, "DECODED", 4)
    whole = look_at_files(annotations, lambda _done: None)
    assert (whole[3].pixels.levels, whole[3].pixels.deep) == (255, True)  # 32 bits are scaled


class Fixed:
    """Chance that leaves images in an order of its own: the second, the third, then the others."""

    def permutation(self, count):
        return np.array([1, 2, 0, 3][:count])


def test_a_file_of_too_many_pixels(annotations, folder):
    Image.new("L", (8, 8)).save(folder / "1.png", "BMP")
    content = bytearray((folder / "1.png").read_bytes())
    content[18:26] = (20_000).to_bytes(4, "little") * 2  # width and height
    (folder / "1.png").write_bytes(content)
    facts = file_facts(annotations, 0)
    assert facts.too_large
    assert "1.png: the image is too large (400,000,000 pixels, the limit is 178,956,970); shrink it" in facts.problem
    assert not file_facts(annotations, 1).too_large


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_tiff_is_turned_already(annotations, folder, orientation):
    (folder / "1.png").unlink()
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "1.png", "TIFF", tiffinfo={0x0112: orientation})
    shown = (WIDTH, HEIGHT) if orientation == 6 else (HEIGHT, WIDTH)
    assert file_facts(annotations, 0).header == ImageHeader("TIFF", shown, 1)


def files(folder, *contents):
    """Facts of files with this content, which same_content compares."""
    found = []
    for i, content in enumerate(contents):
        path = folder / f"{content[:1].hex()}-{i}"
        path.write_bytes(content)
        ends = content[:EDGE] + content[-EDGE:]
        found.append(FileFacts(path, fingerprint=len(content).to_bytes(8, "little") + ends))
    return found


def test_equal_content_is_found_across_splits(tmp_path):
    train, val = files(tmp_path, b"a", b"b", b"a", b"c"), files(tmp_path, b"x", b"a", b"c")
    places = same_content({"train": train, "val": val})
    assert list(places.values()) == [[("train", 0), ("train", 2), ("val", 1)], [("train", 3), ("val", 2)]]


def test_equal_ends_are_not_equal_content(tmp_path):
    end = bytes(EDGE)
    group = files(tmp_path, end + b"1" + end, end + b"2" + end, end + b"1" + end)
    assert len({facts.fingerprint for facts in group}) == 1
    assert list(same_content({"train": group}).values()) == [[("train", 0), ("train", 2)]]


def test_files_that_could_not_be_read_are_equal_to_none(tmp_path):
    broken = [FileFacts(None, "gone"), FileFacts(tmp_path / "x", "broken")]
    assert same_content({"train": broken, "val": broken}) == {}
    assert same_content({}) == {}


def test_fingerprints_tell_length_and_ends(annotations, folder):
    before = [file_facts(annotations, i).fingerprint for i in range(4)]
    assert len(set(before)) == 4
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes())
    assert file_facts(annotations, 1).fingerprint == before[0]
    with (folder / "2.png").open("ab") as file:
        file.write(b"x")
    assert file_facts(annotations, 1).fingerprint != before[0]


def test_jpeg_data_cut_in_the_middle_are_a_warning(tmp_path):
    """The file ends as it should, and Pillow says nothing."""
    write(tmp_path, SOUND, SOUND_VAL)
    content = json.loads((tmp_path / "train.json").read_text())
    for image in content["images"][:2]:
        path = tmp_path / "images" / image["file_name"]
        image["file_name"] = f"{path.stem}.jpg"
        Image.open(path).save(path.with_suffix(".jpg"))
    (tmp_path / "train.json").write_text(json.dumps(content))
    damaged = tmp_path / "images" / "2.jpg"
    good = damaged.read_bytes()
    damaged.write_bytes(good[: len(good) * 3 // 4] + good[-2:])
    found = report(tmp_path)
    cut = finding(found, "JPEG images whose data end before the image does")
    assert (cut.severity, cut.count, cut.examples) == ("warning", 1, ("image 2 (2.jpg)",))
    assert found.usable()

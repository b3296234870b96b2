import os

import numpy as np
import pytest
from foreign_files import picture
from PIL import Image

from tailseg.data.exporters.folder import ExportFolder
from tailseg.data.exporters.records import ExportImage
from tailseg.data.importers.foreign import LeftOut
from tailseg.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return ExportFolder(tmp_path / "out", LeftOut())


def image(tmp_path, name, path=None, image_hw=(40, 80)):
    return ExportImage(name, path or picture(tmp_path / "source.png"), image_hw, [])


def test_images_keep_their_names_and_are_links(tmp_path, folder):
    for name in ("a.png", "sub dir/é 深.png", "a.b.png"):
        assert folder.place(image(tmp_path, name), "images/train") == name
        assert os.path.samefile(folder.root / "images/train" / name, tmp_path / "source.png")
    assert folder.place(image(tmp_path, "a.png"), "images/val") == "a.png"
    assert folder.place(image(tmp_path, "a.png"), "") == "a.png"
    assert (folder.root / "a.png").is_file()
    assert (folder.found.notes(), folder.linked) == ([], True)


def test_without_links_images_are_copies(tmp_path, folder, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder.place(image(tmp_path, "a.png"), "images")
    assert not folder.linked
    assert (folder.root / "images/a.png").read_bytes() == (tmp_path / "source.png").read_bytes()


def test_names_that_are_taken_or_unsafe_are_changed_and_counted(tmp_path, folder):
    named = [
        *(("a.png", "a.png"), ("A.PNG", "A-2.PNG"), ("a.jpg", "a-3.jpg"), ("a-2.png", "a-2-2.png")),
        *(("é.png", "é.png"), ("e\u0301.png", "e\u0301-2.png"), (".hid/x.png", "hid/x.png"), ("../y.png", "_/y.png")),
        *(("q<:>.png", "q___.png"), ("b\\c.png", "b_c.png"), ("d\ne.png", "d_e.png"), ("\udcff.png", "_.png")),
    ]
    for name, expected in named:
        assert folder.place(image(tmp_path, name), "images") == expected
    (note,) = folder.found.notes()
    assert note.startswith("10 images renamed, since their name was taken or cannot be read everywhere (A-2.PNG, ")
    assert len(list((folder.root / "images").rglob("*.*"))) == 12
    assert folder.place(image(tmp_path, "f g.png"), "images", rename=lambda name: name.replace(" ", "_")) == "f_g.png"


def test_names_beyond_what_a_disk_takes_are_cut(tmp_path, folder):
    """With room for a number and for the suffix of a label."""
    for end, expected in (("", ""), ("é", "-2"), ("éé", "-3")):
        assert folder.place(image(tmp_path, f"a/{'é' * 120}{end}.png"), "images") == f"a/{'é' * 115}{expected}.png"
    (note,) = folder.found.notes()
    assert note.startswith("3 images renamed")


def test_nothing_is_written_outside(tmp_path, folder):
    for name in ("../x", "/x", "a/../../x", "..\\x"):
        with pytest.raises(ValueError, match="expected a path inside of"):
            folder.write(name, b"x")
    with pytest.raises(ValueError, match="expected a path inside of"):
        folder.place(image(tmp_path, "a.png"), "../images")
    assert not (tmp_path / "x").exists()
    folder.write("a/b", b"x")
    with pytest.raises(FileExistsError):
        folder.write("a/b", b"y")


def test_opened_files_are_closed_at_the_end(folder):
    with folder:
        file = folder.open("a/b.txt")
        file.write(b"1")
        assert not file.closed
    assert file.closed
    assert (folder.root / "a/b.txt").read_bytes() == b"1"


def test_an_image_annotated_as_stored_is_written_as_stored(tmp_path, folder):
    """The camera turned it by 90 degrees, the tool that annotated it did not know."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 80, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "t.jpg", "PNG", exif=exif)
    assert folder.place(image(tmp_path, "x/t.jpg", tmp_path / "t.jpg", (80, 40)), "images") == "x/t.jpg"
    assert folder.found.notes() == []
    assert folder.place(image(tmp_path, "y/t.jpg", tmp_path / "t.jpg", (40, 80)), "images") == "y/t.png"
    with Image.open(folder.root / "images/y/t.png") as written:
        assert written.getexif().get(0x0112, 1) == 1
        assert np.array_equal(np.asarray(written), pixels)
    (note,) = folder.found.notes()
    assert note == "1 images annotated as their pixels are stored, not as shown: written so, as PNG (y/t.png)"


def test_an_image_of_another_size_is_named(tmp_path, folder):
    with pytest.raises(UserError, match=r"a\.png: it says 70 x 40 pixels but .*source\.png has 80 x 40; correct one"):
        folder.place(image(tmp_path, "a.png", image_hw=(40, 70)), "images")
    with pytest.raises(UserError, match=r"gone\.png: no such image; check the path"):
        folder.place(image(tmp_path, "a.png", tmp_path / "gone.png"), "images")

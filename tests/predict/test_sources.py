import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tailseg
from tailseg.errors import UserError
from tailseg.predict.sources import images_below, open_pictures
from tailseg.predict.video import VideoFile


def read(source: object) -> np.ndarray:
    (item,) = open_pictures(source).items
    return item.read()


def test_modes_are_shown_as_people_see_them(picture: np.ndarray) -> None:
    grey = Image.fromarray(picture).convert("L")
    assert np.array_equal(read(grey), np.repeat(np.asarray(grey)[:, :, None], 3, axis=2))
    turned = Image.fromarray(picture)
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert np.array_equal(read(turned), np.rot90(picture, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16"])
def test_a_pillow_image_and_bytes_are_read_as_the_file_is(mode: str, picture: np.ndarray, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray((picture[:, :, 0].astype(np.uint16) << 8) + 7)
    else:
        image = Image.fromarray(picture).convert(mode)
    if mode in ("RGBA", "LA"):
        alpha = np.zeros((60, 80), np.uint8)
        alpha[:, 40:] = 255
        image.putalpha(Image.fromarray(alpha))
    file = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    image.save(file)
    for source in (image, file.read_bytes(), memoryview(file.read_bytes()), io.BytesIO(file.read_bytes())):
        assert np.array_equal(read(source), read(file))


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)


def write_video(path: Path, frames: int) -> None:
    with VideoFile(path, 5) as video:
        for i in range(frames):
            video.add(np.full((32, 48, 3), 40 * i, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, and much that is none."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a.JPG", "deeper/c.webp", ".d.png", ".hidden/e.png", "deeper/__MACOSX/f.png"):
        write_image(folder / name)
    for name in ("notes.txt", "deeper/labels.json"):
        (folder / name).write_text("{}")
    (folder / "clip.mp4").write_bytes(b"")
    write_image(tmp_path / "elsewhere" / "g.png")
    (folder / "out.png").symlink_to(tmp_path / "elsewhere" / "g.png")
    (folder / "outside").symlink_to(tmp_path / "elsewhere")
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    (folder / "again").symlink_to(folder / "deeper")
    (folder / "loop").symlink_to(folder)
    return folder


def test_a_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, left_out = images_below(folder)
    assert images == [folder / "a.JPG", folder / "b.png", folder / "deeper" / "c.webp"]
    assert left_out == {
        "hidden files": 3,
        "files that are no images": 2,
        "videos (name them one by one)": 1,
        "links that lead out of the folder": 3,
        "links to folders": 2,
    }
    (folder / "inside.png").symlink_to(folder / "b.png")
    with caplog.at_level("INFO"):
        source = open_pictures(str(folder))
    assert (source.kind, source.count) == ("stream", 4)
    assert [item.stem for item in source.items] == ["a", "b", "c", "inside"]
    assert list(source.paths) == [item.path for item in source.items]
    assert "2 files that are no images left out." in caplog.messages


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no image in the folder \(it is empty\); name a folder"):
        open_pictures(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"no image in the folder \(1 files that are no images\)"):
        open_pictures(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipes_are_no_images(tmp_path: Path) -> None:
    """To open one waits for its writer."""
    write_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    files, left_out = images_below(tmp_path)
    assert files == [tmp_path / "a.png"]
    assert left_out == {"files that are no images": 1}
    source = open_pictures(str(tmp_path / "*.png"))
    assert source.paths == [tmp_path / "a.png"]
    assert source.left_out == {"files that are no images": 1}


def test_patterns(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_video(folder / "clip.mp4", 3)
    with caplog.at_level("INFO"):
        source = open_pictures(f"{folder}/*")
    assert caplog.messages == ["4 folders left out.", "1 files that are no images left out."]
    names = [item.name for item in source.items]
    wanted = ["a.JPG", "b.png", *(f"clip.mp4 frame {i}" for i in range(3)), "nowhere.png", "out.png"]
    assert names == [f"{folder}/{name}" for name in wanted]
    assert source.count == len(names)
    assert [item.stem for item in open_pictures(f"{folder}/**/*.webp").items][:1] == ["c"]
    write_image(folder / "[1].png")  # a file of that name comes before the pattern
    (item,) = open_pictures(f"{folder}/[1].png").items
    assert item.path == folder / "[1].png"
    with pytest.raises(UserError, match=r"none\*: no image fits the pattern; check it"):
        open_pictures(f"{folder}/none*")


def test_a_pattern_with_a_broken_video_keeps_the_rest(folder: Path) -> None:
    items = list(open_pictures(f"{folder}/[bc]*.*").items)
    assert [item.name for item in items] == [f"{folder}/b.png", f"{folder}/clip.mp4"]
    assert items[0].read().shape == (3, 4, 3)
    with pytest.raises(UserError, match=r"clip\.mp4: not a video that can be decoded"):
        items[1].read()


def test_lists_are_flattened(folder: Path, picture: np.ndarray) -> None:
    source = open_pictures([folder, [picture], (part for part in (picture, folder / "b.png"))])
    assert (source.kind, source.count) == ("list", None)
    assert [item.name.replace(str(folder), "") for item in source.items] == [
        "/a.JPG", "/b.png", "/deeper/c.webp", "image 1 0", "image 2 0", "/b.png",
    ]  # fmt: skip
    assert open_pictures([folder, picture]).count == 4


def test_a_relative_path_stays_that_of_one_file(
    tmp_path: Path, picture: np.ndarray, model: tailseg.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, pixels in (("one", picture), ("other", 255 - picture)):
        write_image(tmp_path / name / "clip" / "i.png")
        Image.fromarray(pixels).save(tmp_path / name / "i.png")
    write_video(tmp_path / "one" / "v.mp4", 2)
    monkeypatch.chdir(tmp_path / "one")
    found, folder, video = model.predict("i.png"), open_pictures("clip"), open_pictures("v.mp4")
    Path("clip/i.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "other")
    assert found.source == "i.png"
    assert (found.picture == picture).all()
    assert len(list(video.items)) == 2
    (item,) = folder.items
    assert (item.name, item.path) == (str(Path("clip/i.png")), tmp_path / "one" / "clip" / "i.png")
    with pytest.raises(UserError, match=r"^clip/i\.png: the file is empty"):
        item.read()
    (tmp_path / "one" / "i.png").unlink()
    with pytest.raises(UserError, match=r"^i\.png: no such image"):
        found.plot()


def test_paths_of_any_type(folder: Path) -> None:
    class Own(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(folder / "b.png")

    assert read(Own()).shape == (3, 4, 3)


def test_urls_are_not_asked_before_their_turn() -> None:
    names = {
        "http://127.0.0.1:9/a%20b/cat.jpg?size=2": "cat",
        "https://127.0.0.1:9/": "image",
        "HTTP://127.0.0.1:9/%2e%2e%2f%00x:y.png": "_x_y",
        "http://127.0.0.1:9/" + "n" * 400 + ".png": "n" * 100,
    }
    for url, stem in names.items():
        (item,) = open_pictures(url).items
        assert (item.name, item.stem, item.path) == (url, stem, None)
        with pytest.raises(UserError, match="cannot be reached"):
            item.read()

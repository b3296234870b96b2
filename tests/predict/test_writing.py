import errno
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_sets import read_again
from hotcoco import mask as rle
from PIL import Image
from predictions import rectangles
from tiny import assert_done, assert_refused
from tiny import tailseg as tailseg_command

import tailseg
from tailseg.data.importers.convert import READERS
from tailseg.errors import UserError
from tailseg.predict import Model
from tailseg.predict.video import VideoFile
from tailseg.predict.writing import Request, Tally, _Folder, export_predictions, predict_files


def test_files(model: Model, picture: np.ndarray, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        Image.fromarray(picture).save(folder / "p.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a" / "p.png").read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no image")
    images = [folders[0] / "p.png", tmp_path / "broken.png", tmp_path / "gone.png", tmp_path / "text.jpg"]
    images += [folders[1] / "p.png", folders[0] / "p.png"]
    out = tmp_path / "new" / "out"
    faults = predict_files(model, Request(images, min_score=0, show=False), out).faults
    assert [str(name) in fault for name, fault in zip(images[1:4], faults, strict=True)] == [True] * 3
    assert not any("\n" in fault for fault in faults)
    assert sorted(path.name for path in out.iterdir()) == [
        "p-2.json", "p-2.png", "p-3.json", "p-3.png", "p.json", "p.png",
    ]  # fmt: skip
    content = json.loads((out / "p-2.json").read_text())
    found = model.predict(picture)
    assert content["image"] == str(folders[1] / "p.png")
    assert (content["height"], content["width"]) == (60, 80)
    assert [row["score"] for row in content["detections"]] == pytest.approx(found.scores.tolist())
    assert predict_files(model, Request([]), out) == Tally(floor=model.recipe.test.score_threshold)
    again = predict_files(model, Request(images[:1], min_score=1), out)  # written again under its own name
    assert again == Tally(1, 0, 1, float(found.scores[0]), model.recipe.test.score_threshold)
    assert json.loads((out / "p.json").read_text())["detections"] == []
    with pytest.raises(UserError, match=r"p\.json: the folder cannot be made"):
        predict_files(model, Request(images), out / "p.json")


def test_threads_write_what_one_writes(
    path: Path, picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of one name and the frames of a video between them, in their order."""
    inputs = [tmp_path / name for name in ("a/p.png", "b/p.png", "clip.mp4", "c/p.png")]
    for i, file in enumerate(inputs):
        file.parent.mkdir(exist_ok=True)
        if file.suffix == ".png":
            Image.fromarray(np.roll(picture, 20 * i, axis=1)).save(file)
    with VideoFile(inputs[2], 5) as video:
        for i in range(9):
            video.add(np.roll(picture, 3 * i, axis=0))
    model = tailseg.load(path, "cpu", ["test.max_detections=3"])
    written = []
    for cores in (1, 4):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        out = tmp_path / f"out-{cores}"
        tally = predict_files(model, Request(inputs, min_score=0, show=False), out)
        assert (tally.pictures, tally.faults) == (12, [])
        written.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert written[0] == written[1]
    stems = ("p", "p-2", "p-3")
    assert written[0].keys() == {f"{stem}{end}" for stem in stems for end in (".png", ".json")} | {
        "clip.mp4", "clip.jsonl"
    }  # fmt: skip
    frames = [json.loads(line)["frame"] for line in written[0]["clip.jsonl"].splitlines()]
    assert frames == list(range(9))


@pytest.mark.parametrize(
    ("kind", "sentence", "left"),
    [
        ("json", "Stopped. What was written until then is in {out}.", True),
        ("coco", "Stopped. {out} was not made: a set is written whole or not at all.", False),
    ],
)
def test_after_ctrl_c_it_says_what_is_there(
    path: Path,
    picture: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    sentence: str,
    left: bool,
) -> None:
    Image.fromarray(picture).save(tmp_path / "p.png")
    outcomes = Model.outcomes

    def stopped(self: Model, *given: Any) -> Iterator[Any]:
        yield from islice(outcomes(self, *given), 20)
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "outcomes", stopped)
    out = tmp_path / "out"
    done = tailseg_command("predict", path, *[tmp_path / "p.png"] * 30, "--format", kind, "--out", out, "--quiet")
    assert (done.returncode, done.stderr.strip()) == (130, sentence.format(out=out))
    assert out.exists() == left
    for file in out.glob("*"):
        json.loads(file.read_text())


@pytest.mark.parametrize("name", ["p.png", "p.json"])
def test_a_file_that_cannot_be_written_ends_it(model: Model, picture: np.ndarray, tmp_path: Path, name: str) -> None:
    Image.fromarray(picture).save(tmp_path / "p.png")
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"out/{name}: could not be written \(Is a directory\)"):
        predict_files(model, Request([tmp_path / "p.png"] * 30, show=False), tmp_path / "out")


def test_names_that_some_file_systems_take_for_the_same(model: Model, picture: np.ndarray, tmp_path: Path) -> None:
    """On Windows and macOS shot.png would be written over Shot.PNG, which is an input."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("Shot.PNG", "one.png"):
        Image.fromarray(picture).save(photos / name, "PNG")
    (tmp_path / "ONE.png").write_bytes((photos / "one.png").read_bytes())
    predict_files(model, Request([photos / "Shot.PNG"], show=False), photos)
    assert {path.name for path in photos.iterdir()} == {"Shot.PNG", "one.png", "Shot-2.png", "Shot-2.json"}
    predict_files(model, Request([photos / "one.png", tmp_path / "ONE.png"], show=False), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ONE-2.json",
        "ONE-2.png",
        "one.json",
        "one.png",
    ]


def test_inputs_are_never_written_over(model: Model, picture: np.ndarray, tmp_path: Path) -> None:
    """In the folder of the results, by a link, and as a twin that comes earlier in the list."""
    for name in ("p.png", "q.png"):
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "q-2.png").write_bytes((tmp_path / "q.png").read_bytes())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    inputs = [elsewhere / "q.png", tmp_path / "q-2.png", tmp_path / "p.png"]
    assert predict_files(model, Request(inputs), tmp_path).faults == []
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["p-2.json", "q-2-2.json", "q-3.json"]


@pytest.fixture
def photographs(picture: np.ndarray, tmp_path: Path) -> list[Path]:
    """Two of the same name, one of them turned by the camera, and a broken one."""
    paths = [tmp_path / "a" / "p q.jpg", tmp_path / "b" / "p q.jpg", tmp_path / "broken.png"]
    exif = Image.Exif()
    exif[0x0112] = 6
    for path, kept in zip(paths, (Image.Exif(), exif, None), strict=True):
        path.parent.mkdir(exist_ok=True)
        if kept is not None:
            Image.fromarray(picture).save(path, exif=kept)
    paths[2].write_bytes(b"no image")
    return paths


@pytest.mark.parametrize("kind", ["coco", "yolo", "labelme", "cvat"])
def test_predictions_that_a_tool_can_open(
    kind: str, path: Path, model: Model, photographs: list[Path], tmp_path: Path
) -> None:
    """Through the command and back by the importers: the same classes, and masks that differ by their outlines only."""
    out = tmp_path / "out"
    score = float(model.predict(photographs[0]).scores[4])
    done = tailseg_command("predict", path, *photographs, "--out", out, "--format", kind, "--score", score, "--quiet")
    assert done.returncode == 1
    assert done.stderr.startswith(f"tailseg: {photographs[2]}: ")
    found = [model.predict(image) for image in photographs[:2]]
    found = [one[one.scores >= score] for one in found]
    count = sum(map(len, found))
    assert done.stdout.splitlines()[:2] == [
        f"2 pictures, {count} objects, 0 empty, 1 not readable", f"{kind} set in {out}",
    ]  # fmt: skip
    assert "- 1 images renamed" in done.stdout
    again = read_again(READERS[kind](out))["train"]
    assert set(again) == {image.read_bytes() for image in photographs[:2]}
    for image, one in zip(photographs, found, strict=False):
        objects = again[image.read_bytes()]
        for item, expected in zip(objects, one.to_dict()["detections"], strict=True):
            assert item["name"] == expected["category"]
            ours, theirs = item["pixels"], rle.decode(expected["segmentation"])
            assert (ours & theirs).sum() >= 0.9 * (ours | theirs).sum()
            assert kind != "coco" or item["score"] == expected["score"]


def test_no_format_is_written_without_an_image(path: Path, photographs: list[Path], tmp_path: Path) -> None:
    line = ("predict", path, photographs[2], "--out", tmp_path / "out", "--quiet", "--format")
    assert_refused(tailseg_command(*line, "coco"), str(photographs[2]))
    assert not (tmp_path / "out").exists()
    assert tailseg_command(*line, "voc").returncode == 2
    exported, tally = export_predictions(tailseg.load(path, "cpu"), Request([]), tmp_path / "out", "yolo")
    assert (exported.images, tally.pictures, tally.faults) == ({"": 0}, 0, [])
    assert_refused(tailseg_command(*line, "coco"), "is not empty")


def test_folders_patterns_and_a_limit(path: Path, photographs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "a" / "notes.txt").write_text("")
    line = ("predict", path, tmp_path / "a", f"{tmp_path}/b/*.jpg", "--out", out, "--score", 0)
    done = tailseg_command(*line)
    assert_done(done)
    assert done.stdout == f"2 pictures, 18 objects, 0 empty\nPictures and JSON in {out}\n"
    assert "1 files that are no images left out." in done.stderr
    assert sorted(file.name for file in out.iterdir()) == ["p q-2.json", "p q-2.png", "p q.json", "p q.png"]
    done = tailseg_command(*line[:-3], tmp_path / "json", "--limit", 1, "--format", "json", "--score", 0, "--quiet")
    assert done.stdout == f"1 picture, 9 objects, 0 empty\nJSON in {tmp_path / 'json'}\n"
    assert [file.name for file in (tmp_path / "json").iterdir()] == ["p q.json"]
    assert done.stderr == ""


def test_what_cannot_be_opened_is_counted(path: Path, photographs: list[Path], tmp_path: Path) -> None:
    """An empty folder, a pattern without images and a missing file do not stop the others."""
    (tmp_path / "none").mkdir()
    sources = (tmp_path / "none", photographs[0], f"{tmp_path}/*.gif", *(tmp_path / f"gone-{i}.jpg" for i in range(5)))
    done = tailseg_command("predict", path, *sources, "--out", tmp_path / "out", "--score", 0, "--quiet")
    assert_refused(done, "none: there is no image in the folder", "*.gif: no image fits", "gone-2.jpg: no such image")
    assert done.stderr.rstrip().endswith("; and 2 more")
    assert done.stdout.startswith("1 picture, 9 objects, 0 empty, 7 not readable\n")


def test_nothing_found_names_a_score_to_try(path: Path, model: Model, photographs: list[Path], tmp_path: Path) -> None:
    best = float(model.predict(photographs[0]).scores[0])
    line = ("predict", path, photographs[0], "--out", tmp_path / "out", "--quiet")
    first = tailseg_command(*line, "--score", 1).stdout.splitlines()[0]
    stated, advised = (float(word.rstrip(";")) for word in (first.split()[-4], first.split()[-1]))
    assert first.startswith("1 picture, 0 objects, 1 empty: the best score there is ")
    assert stated == pytest.approx(best, rel=0.05)
    assert best * 0.5 < advised <= best
    assert tailseg_command(*line, "--score", advised).stdout.splitlines()[0].endswith(" 0 empty")


@pytest.mark.parametrize(
    ("tally", "sentence"),
    [
        (Tally(41, 212, 3, 0.31), "41 pictures, 212 objects, 3 empty"),
        (Tally(4, 1, 3, 0.31), "4 pictures, 1 object, 3 empty: the best score there is 0.31; try --score 0.3"),
        (Tally(1, 0, 1, 0.3), "1 picture, 0 objects, 1 empty: the best score there is 0.3; try --score 0.3"),
        (Tally(1, 0, 1, 0.0479), "1 picture, 0 objects, 1 empty: the best score there is 0.048; try --score 0.04"),
        (
            Tally(2, 0, 2, floor=0.05),
            "2 pictures, 0 objects, 2 empty: nothing there reaches a score of 0.05, the lowest looked for",
        ),
        (Tally(faults=["a"]), "0 pictures, 0 objects, 0 empty, 1 not readable"),
    ],
)
def test_the_counts(tally: Tally, sentence: str) -> None:
    assert tally.sentence() == sentence


def test_a_score_below_the_recipes_own(path: Path, photographs: list[Path], tmp_path: Path) -> None:
    """The recipe's threshold bounds what is found only where no lower score is asked for."""
    line = ("predict", path, photographs[0], "--set", "test.score_threshold=0.99", "--quiet", "--out")
    low, high = (tailseg_command(*line, tmp_path / str(score), "--score", score) for score in (0, 0.995))
    assert low.stdout.startswith("1 picture, 9 objects, 0 empty\n")
    assert high.stdout.startswith("1 picture, 0 objects, 1 empty: nothing there reaches a score of 0.99, ")


def test_slices_on_the_command_line(path: Path, model: Model, tmp_path: Path) -> None:
    Image.fromarray(np.tile(rectangles(), (2, 2, 1))).save(tmp_path / "p.png")
    options = ("--slices", 80, "--overlap", 0.25, "--score", 0, "--format", "json", "--quiet")
    assert_done(tailseg_command("predict", path, tmp_path / "p.png", "--out", tmp_path, *options))
    rows = json.loads((tmp_path / "p.json").read_text())["detections"]
    found = model.predict(tmp_path / "p.png", slices=80, overlap=0.25, score=0)
    assert len(found) > 9
    assert [row["score"] for row in rows] == pytest.approx(found.scores.tolist(), abs=1e-4)


def test_results_inside_of_the_folder_are_no_pictures_the_next_time(
    path: Path, photographs: list[Path], tmp_path: Path
) -> None:
    line = ("predict", path, tmp_path / "a", "--out", tmp_path / "a" / "out", "--score", 0, "--quiet")
    first, again = tailseg_command(*line), tailseg_command(*line)
    assert_done(first)
    assert first.stdout == again.stdout
    assert first.stdout.startswith("1 picture, 9 objects")


def test_an_overlap_without_slices_is_refused(path: Path, tmp_path: Path) -> None:
    done = tailseg_command("predict", path, tmp_path, "--overlap", 0.3)
    assert done.returncode == 2
    assert "--overlap" in done.stderr
    assert "add --slices" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="names there are Unicode")
@pytest.mark.parametrize("kind", ["json", "coco", "labelme", "yolo", "cvat"])
def test_a_name_that_is_not_utf_8_stops_nothing(path: Path, picture: np.ndarray, tmp_path: Path, kind: str) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"a.png", b"caf\xe9.png", b"z.png"):
        try:
            Image.fromarray(picture).save(photos / os.fsdecode(name))
        except OSError:
            pytest.skip("this file system takes UTF-8 alone")
    out = tmp_path / "out"
    done = tailseg_command("predict", path, photos, "--out", out, "--format", kind, "--score", 0, "--quiet")
    assert_done(done)
    assert done.stdout.startswith("3 pictures, ")
    if kind == "json":
        named = [json.loads(file.read_bytes())["image"] for file in sorted(out.iterdir())]
        assert named == [str(photos / name) for name in ("a.png", "caf\\xe9.png", "z.png")]


def test_numbers_go_on_from_the_last_one(tmp_path: Path) -> None:
    """And do so at once: 3,000 pictures of one name are not compared with each other."""
    folder = _Folder(tmp_path, {"p.png", "p-3.json"}, pictures=True)
    names = [folder._free("p", (".png", ".json")) for _ in range(3)]
    assert names == ["p-2", "p-4", "p-5"]
    assert [folder._free("p", (".mp4", ".jsonl")) for _ in range(2)] == ["p", "p-2"]
    assert [folder._free("P-4", (".json",)), folder._free("q", (".json",))] == ["P-4-2", "q"]

    class Counted(set):
        asked = 0

        def __contains__(self, name: object) -> bool:
            Counted.asked += 1
            return super().__contains__(name)

    folder = _Folder(tmp_path, Counted(), pictures=True)
    assert [folder._free("p", (".png", ".json")) for _ in range(3000)][-1] == "p-3000"
    assert Counted.asked < 4 * 3000


@pytest.mark.parametrize("kind", ["json", "labelme"])
def test_the_longest_names_are_cut(path: Path, picture: np.ndarray, tmp_path: Path, kind: str) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for end in "ab":
        Image.fromarray(picture).save(photos / ("é" * 125 + f"{end}.png"))
    out = tmp_path / "out"
    done = tailseg_command("predict", path, photos, "--out", out, "--format", kind, "--score", 0, "--quiet")
    assert_done(done)
    written = sorted(file.name for file in out.rglob("*.json"))
    assert written == ["é" * 115 + "-2.json", "é" * 115 + ".json"]


def test_pages_that_are_not_looked_at_are_counted(path: Path, picture: np.ndarray, tmp_path: Path) -> None:
    """One picture a file, however many pages it has."""
    photos = tmp_path / "photos"
    photos.mkdir()
    pages = [Image.fromarray(np.roll(picture, 9 * i, axis=1)) for i in range(3)]
    pages[0].save(photos / "scan.tif", save_all=True, append_images=pages[1:])
    pages[0].save(photos / "film.gif", save_all=True, append_images=pages[1:])
    pages[0].save(photos / "one.tif")
    pages[0].save(photos / "phone.jpg", "MPO", save_all=True, append_images=pages[1:])
    done = tailseg_command("predict", path, photos, "--out", tmp_path / "out", "--score", 0, "--quiet")
    assert_done(done)
    assert done.stdout.startswith("4 pictures, ")
    assert ", 4 more pages of files not looked at" in done.stdout


def test_a_full_disk_leaves_the_files_of_before(
    model: Model, picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture).save(tmp_path / "p.png")
    out, request = tmp_path / "out", Request([tmp_path / "p.png"], show=False)
    predict_files(model, request, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write_bytes(path, content[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"out/p\.png: could not be written \(No space left on device\); make room"):
        predict_files(model, request, out)
    with pytest.raises(UserError, match=r"p\.json: could not be written \(No space left on device\)"):
        model.predict(picture).save(out / "p.json")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before

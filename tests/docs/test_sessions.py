"""The sessions of the README, in a terminal and in Python, of the start page, and the Python of the page on training.

They are run from top to bottom. The data are small, and a recipe that trains in seconds stands in for those of the
text; all else is as it is written.
"""

import contextlib
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import SMALL_RECIPE, assert_done, options
from tiny import tailseg as command

import tailseg
from tailseg import jobs
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.jobs import Trained
from tailseg.recipes.resolve import resolve

ROOT = Path(__file__).parents[2]
SMALL = (*SMALL_RECIPE, "schedule={epochs: 2, milestones: []}", "training.evaluate_every=1")


def blocks(page: str, language: str, word: str) -> list[str]:
    """The blocks of a language in which a word stands."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if word in block]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLO export, a folder of pictures and a large one, as a user has them."""
    folder = tmp_path_factory.mktemp("place")
    settings = SyntheticSettings(classes=4, train_images=12, val_images=4, size=64, rarest=3)
    drawn = write_synthetic(folder / "drawn", settings)
    assert_done(command("data", "export", "yolo", drawn, folder / "my_yolo"))
    pictures = sorted((drawn / "images").rglob("*.*"))[:2]
    (folder / "photos").mkdir()
    for path in pictures:
        (folder / "photos" / path.name).write_bytes(path.read_bytes())
    large = np.tile(np.asarray(Image.open(pictures[0]).convert("RGB")), (3, 12, 1))
    Image.fromarray(large).save(folder / "large.png")
    return folder


def small_training(*arguments: Any, **settings: Any) -> Trained:
    """`tailseg.train` with a recipe that trains in seconds."""
    _, data, out = arguments if len(arguments) == 3 else (*arguments, settings.pop("data"), settings.pop("out"))
    settings["schedule__epochs"] = min(settings["schedule__epochs"], 3)
    return jobs.train(resolve("demo/seesaw", SMALL), data, out, show=False, **settings)


def test_the_terminal_session_of_the_readme(place: Path) -> None:
    (block,) = blocks("README.md", "", "data check")
    for line in block.splitlines():
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "train":
            words = [word for word in words if word not in ("--init", "coco")]
            words[1] = "demo/seesaw"
            words += options(SMALL)
        assert_done(command(*words, cwd=place))
    assert (place / "runs/mine/eval-my_yolo-val/analysis.html").is_file()
    stems = {path.stem for path in (place / "photos").iterdir()}
    assert {path.name for path in (place / "predictions").iterdir()} == {
        f"{s}{e}" for s in stems for e in (".png", ".json")
    }
    assert (place / "labelled" / "data.yaml").is_file()
    assert (place / "slices" / "large.json").is_file()


def session(place: Path, monkeypatch: pytest.MonkeyPatch, block: str) -> dict[str, Any]:
    monkeypatch.setattr(tailseg, "train", small_training, raising=False)
    names: dict[str, Any] = {}
    with contextlib.chdir(place):
        exec(block, names)
    return names


def test_the_python_session_of_the_readme(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("supervision")
    pytest.importorskip("pandas")
    (block,) = blocks("README.md", "python", "tailseg.train")
    names = session(place, monkeypatch, block)
    assert names["trained"].out == Path("runs/laptop")
    assert names["found"].masks.shape[1:] == (64, 64)
    assert (place / "drawn.png").is_file()


def test_the_python_of_the_page_on_training(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks("docs/train.md", "python", "tailseg.train")
    names = session(place, monkeypatch, block.replace("runs/mine", "runs/page"))
    assert capsys.readouterr().out == "[('classifier.p', 0.8, 0.6)]\n"
    assert names["again"].metrics["segm"]["AP"] is not None
    files = ["metrics.json", "analysis.html", "thresholds.json", "detections.json"]
    assert [file.name for file in names["found"].files] == files
    assert set(names["scores"].metrics) == {"bbox", "segm"}
    assert all(isinstance(value, float | None) for value in names["rare"].values())


def test_the_session_of_the_start_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = {"--classes": "4", "--images": "12", "--val-images": "4", "--size": "64"}
    lines = [line for word in ("data synth", "eval") for line in blocks("docs/start.md", "", word)[0].splitlines()]
    for line in lines:
        words = shlex.split(line)[1:]
        words = [smaller.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        assert_done(command(*words, *(options(SMALL) if words[0] == "train" else ()), cwd=tmp_path))
    assert (tmp_path / "runs/first/eval-shapes-val/analysis.html").is_file()
    assert len(list((tmp_path / "predictions").glob("*.json"))) == 8
    (block,) = blocks("docs/start.md", "python", "tailseg.load")
    with contextlib.chdir(tmp_path):
        exec(block, {})
    assert "torch.Size([" in capsys.readouterr().out
    assert (tmp_path / "first.png").is_file()

"""What the command line does for its users: shorthands, folders of runs, devices, and answers without a wait."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tiny import ENVIRONMENT, SMALL_RECIPE, assert_done, assert_refused, options, tailseg

from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.predict import load

SETTINGS = options((*SMALL_RECIPE, "schedule={epochs: 1, milestones: [], warmup_steps: 0}", "training.log_steps=2"))
COMMANDS = (
    *((name,) for name in ("demo", "train", "eval", "predict", "score", "data", "convert", "recipes")),
    *(("data", name) for name in ("synth", "check", "convert", "split", "export")),
    *(("convert", name) for name in ("mmdet", "torchvision", "detectron2")),
    *(("recipes", name) for name in ("list", "show", "diff")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a data set, ``data``, from which commands are called."""
    folder = tmp_path_factory.mktemp("place")
    settings = SyntheticSettings(classes=4, train_images=8, val_images=2, size=64, rarest=3)
    write_synthetic(folder / "data", settings)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> str:
    """Stderr of a training in ``folder`` that named no --out."""
    done = tailseg("train", "demo/seesaw", "--data", "data", "--device", "cpu", *SETTINGS, cwd=folder)
    assert_done(done)
    assert "Models: runs/demo-seesaw/best.safetensors" in done.stdout
    return done.stderr


def test_version_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert tailseg("--version").stdout == f"tailseg {version('tailseg')}\n"
    for words in ((), *COMMANDS):
        short, long = tailseg(*words, "-h"), tailseg(*words, "--help")
        assert short.returncode == long.returncode == 0
        assert short.stdout == long.stdout
        assert "Usage" in short.stdout


def test_the_shell_completes() -> None:
    """Both as a module and as the script: what click sets before it asks for completions."""
    words = {"_TAILSEG_COMPLETE": "complete_bash", "COMP_WORDS": "tailseg ev", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['tailseg']; from tailseg.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT | words, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["eval"]


def test_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "tailseg", "--version"], env=ENVIRONMENT, capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, f"tailseg {version('tailseg')}\n")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["data", "check", "nowhere"], ["recipes"]])
def test_pytorch_is_not_waited_for(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from tailseg.cli.main import main; sys.argv[0] = 'tailseg'\n"
        "try: main()\n"
        "finally: print('with torch' if 'torch' in sys.modules else 'without torch')"
    )
    line = [sys.executable, "-c", code, *words]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.endswith("without torch\n")
    if "nowhere" in words:
        assert done.returncode == 1
        assert done.stderr.startswith("tailseg: nowhere: no such folder or file; ")


def test_a_run_says_how_it_goes_and_where_it_writes(trained: str) -> None:
    assert "Folder of the run: runs/demo-seesaw\n" in trained
    lines = [line for line in trained.splitlines() if line.startswith("training: ")]
    assert [line.split(",")[:2] for line in lines] == [["training: 2/4", " epoch 1/1"], ["training: 4/4", " epoch 1/1"]]
    for word in ("loss ", "rate 0.0125", " images/s", "0:00:00 left"):
        assert word in lines[1]


def test_a_second_run_gets_a_folder_of_its_own(trained: str, folder: Path) -> None:
    line = ("train", "demo/seesaw", "--data", "data", "--quiet", *SETTINGS)
    done = tailseg(*line, cwd=folder)
    assert_done(done)
    assert done.stderr == ""
    assert "Models: runs/demo-seesaw-2/best.safetensors" in done.stdout
    more = tailseg(*line, "--resume", "--set", "schedule.epochs=2", cwd=folder)  # the last of them goes on
    assert_done(more)
    assert "Models: runs/demo-seesaw-2/best.safetensors" in more.stdout
    for name, epochs in (("demo-seesaw", 1), ("demo-seesaw-2", 2)):
        assert f"epochs: {epochs}" in tailseg("recipes", "show", folder / "runs" / name / "last.safetensors").stdout


def test_a_run_s_folder_is_a_model(trained: str, folder: Path) -> None:
    run = folder / "runs" / "demo-seesaw"
    done = tailseg("eval", run, "--data", folder / "data", "--device", "cpu")
    assert_done(done)
    assert f"Written: {run}/eval-data-val/metrics.json" in done.stdout
    picture = next((folder / "data" / "images").iterdir())
    done = tailseg("predict", "runs/demo-seesaw", picture, cwd=folder)
    assert_done(done)
    assert (folder / "predictions" / f"{picture.stem}.json").is_file()
    assert "name: demo/seesaw" in tailseg("recipes", "show", run).stdout
    # The best, else the last.
    best, last = load(run).detector.state_dict(), load(run / "last.safetensors").detector.state_dict()
    assert all(torch.equal(best[key], last[key]) for key in best)  # of the same step here
    (run / "best.safetensors").rename(run / "kept")
    assert len(load(str(run)).categories) == 4
    (run / "last.safetensors").rename(run / "kept-too")
    sentence = f"{run}: this folder holds no best.safetensors or last.safetensors; give a run's folder or a model file"
    for words in (("predict", run, picture), ("eval", run, "--data", folder / "data"), ("recipes", "show", run)):
        assert_refused(tailseg(*words), sentence)
    (run / "kept").rename(run / "best.safetensors")
    (run / "kept-too").rename(run / "last.safetensors")


def test_devices_that_are_not_there(trained: str, folder: Path, tmp_path: Path) -> None:
    model = folder / "runs" / "demo-seesaw"
    lines = (
        ("train", "demo/seesaw", "--data", folder / "data", "--out", tmp_path / "x"),
        ("eval", model, "--data", folder / "data"),
        ("predict", model, "photo.jpg", "--out", tmp_path / "p"),
        ("demo", "--out", tmp_path / "demo"),
    )
    for line in lines:
        assert_refused(tailseg(*line, "--device", "gpu"), "device 'gpu': there is no such device; did you mean 'cuda'?")
    assert list(tmp_path.iterdir()) == []


def test_frozen_stages_at_random_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    line = ("train", "small/seesaw", "--data", folder / "data", "--out", tmp_path / "x", "--quiet")
    done = tailseg(*line, "--set", "model.backbone.pretrained=false")
    assert_refused(done, "model.backbone.frozen_stages = 2: with model.backbone.pretrained=false", "frozen_stages=-1")
    assert not (tmp_path / "x").exists()


def test_a_key_without_its_section_is_found(tmp_path: Path) -> None:
    done = tailseg("recipes", "show", "small/seesaw", "--set", "epochs=3")
    assert_refused(done, "--set epochs=3: unknown key 'epochs'; did you mean 'schedule.epochs'?")
    (tmp_path / "own.yaml").write_text("extends: small/seesaw\nlr: 0.1\n")
    assert_refused(tailseg("recipes", "show", tmp_path / "own.yaml"), "own.yaml: unknown key 'lr'; did you mean 'opt")


def test_several_sections_may_have_such_a_key() -> None:
    done = tailseg("recipes", "show", "small/seesaw", "--set", "nms_iou=0.6")
    assert_refused(done, "unknown key 'nms_iou'; did you mean 'model.rpn.nms_iou' or 'test.nms_iou'?")


def test_a_gpu_without_memory_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tailseg import predict

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(predict, "load", full)
    done = tailseg("predict", "m.safetensors", folder)
    assert_refused(done, "the memory of the GPU is too small for this", "--device", "data.test_short_edge")

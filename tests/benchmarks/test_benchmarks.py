"""The benchmarks run and write what they promise, and the model that we compare with does the same work as ours."""

import importlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tailseg

from tailseg.checkpoint import save_model
from tailseg.data.dataset import train_dataset
from tailseg.data.sources import open_splits
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.losses import CLASSIFICATIONS, SeesawLoss
from tailseg.model.build import build_detector
from tailseg.recipes.data_section import DataRecipe
from tailseg.recipes.ladder import costs
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import override

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--batch=1", "--size", "64", "96", "--classes=7", "--pairs=200", "--objects=2", "--repeats=1", "--threads=1"]
TINY += ["--models", "table1/seesaw"]
TINY += ["--set=model.backbone.name=resnet18", "--set=model.neck.channels=16", "--set=model.box_head.width=32"]
TINY += ["--set=model.mask_head.channels=16", "--set=test.max_detections=10"]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def run(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function: run a script in this process; one of its own would import PyTorch again."""
    threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()

    def script(name: str, *arguments: str) -> None:
        assert (FOLDER / f"{name}.py").read_text().endswith('\n\nif __name__ == "__main__":\n    main()\n')
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        importlib.import_module(name).main()

    yield script
    torch.set_num_threads(threads)
    cv2.setNumThreads(cv2_threads)


@pytest.fixture
def one_process(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in a process of its own is measured here, from what such a process would be sent."""
    import harness

    peak = harness.peak_memory

    def here(function: Callable[..., Any], *args: Any) -> Any:
        function, args = pickle.loads(pickle.dumps((function, args)))
        return pickle.loads(pickle.dumps(function(*args)))

    monkeypatch.setattr(harness, "in_own_process", here)
    # Freed memory may be all that a call needs; ratios are taken of what it grew by.
    monkeypatch.setattr(harness, "peak_memory", lambda call, device: max(1, peak(call, device)))


@pytest.fixture
def no_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")


@pytest.mark.nightly
def test_predicting(run, one_process, tmp_path):
    out = tmp_path / "p.json"
    small = ["--set=model.neck.channels=16", "--set=model.box_head.width=32", "--set=model.mask_head.channels=8"]
    run(
        "predicting", "--pictures=20", "--timed=4", "--repeats=1", "--detections=5", "--batch=4", *small, f"--out={out}"
    )
    result = json.loads(out.read_text())
    memory = result["memory"]
    assert (memory["pictures"], memory["objects"], len(memory["resident_bytes"])) == (20, 100, 10)
    assert memory["as_a_list_bytes"] == 20 * (64 * 64 * 3 + 5 * (4 * 4 + 4 + 8 + 28 * 28 * 4))
    assert memory["growth_bytes"] < 1 << 28
    assert result["time"]["speedup"]["clock"]["of_medians"] > 0
    for name in ("a", "b"):
        Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(tmp_path / f"{name}.png")
    run("predicting", f"--photos={tmp_path}", "--timed=4", "--repeats=1", *small, f"--out={out}")
    files = json.loads(out.read_text())["files"]
    assert (files["photos"], files["files_that_differ"]) == (2, 0)


@pytest.mark.nightly
def test_throughput(run, tmp_path):
    run("throughput", *TINY, "--tasks", "infer", "--out", str(tmp_path / "t.json"))
    result = json.loads((tmp_path / "t.json").read_text())
    assert {"python", "torch", "torchvision", "threads"} <= result["machine"].keys()
    assert result["settings"]["size"] == [64, 96]
    row = result["infer"]["table1/seesaw"]
    assert row["detections"] == [10]
    assert row["calls"] == 1
    assert row["peak_bytes"] > 0
    assert row["images_per_second"] == pytest.approx(1 / row["seconds"]["median"])


def test_profile(run, tmp_path):
    run("throughput", *TINY, "--profile", "--out", str(tmp_path / "p.json"))
    profile = json.loads((tmp_path / "p.json").read_text())["profile"]
    assert {"backbone", "neck", "proposals", "box pooling", "mask head", "backward"} <= profile["train"].keys()
    assert {"class NMS", "scores", "mask pasting", "all else"} <= profile["infer"].keys()
    assert all(seconds > -0.01 for part in profile.values() for seconds in part.values())


def test_losses(run, monkeypatch, tmp_path):
    import losses

    tiny = {"SIZES": ((8, 11), (9, 7)), "TEXTBOOK_SIZE": (8, 11), "ALL_SIZE": (8, 11), "TURN": 0}
    for name, value in tiny.items():
        monkeypatch.setattr(losses, name, value)
    run("losses", "--repeats=2", "--threads=1", "--out", str(tmp_path / "l.json"))
    result = json.loads((tmp_path / "l.json").read_text())
    assert result["machine"]["threads"] == 1
    assert result["sizes"].keys() == {"8x11", "9x7"}
    for rows in (*result["sizes"].values(), result["classifications"]):
        base = next(iter(rows.values()))
        assert base["time_ratio"]["median"] == base["memory_ratio"] == 1
        for row in rows.values():
            assert row["seconds"]["min"] > 0
            assert row["memory_ratio"] == row["bytes"] / base["bytes"]
    assert result["textbook"]["largest_difference"] < 1e-5
    assert result["textbook"]["textbook"]["time_ratio"]["median"] > 0
    assert result["classifications"].keys() == {"cross-entropy by torch", *CLASSIFICATIONS}
    assert "waits" not in result


@pytest.mark.usefixtures("benchmarks")
def test_textbook_seesaw_is_ours():
    from losses import textbook_seesaw

    torch.manual_seed(0)
    ours, counts = SeesawLoss(7).double().train(), torch.zeros(7)
    for _ in range(3):
        logits, labels = torch.randn(20, 7, dtype=torch.float64), torch.randint(0, 7, (20,)).square() // 7
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        losses = ours(a, labels), textbook_seesaw(b, labels, counts, ours.p)
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*torch.autograd.grad(losses, (a, b)), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("benchmarks")
def test_memory_held_by_hand():
    from losses import held_memory

    def step() -> torch.Tensor:
        first = torch.empty(1000)  # 4000 bytes
        second = first.clone()  # 8000 together
        del first
        return second.clone()  # 8000 again

    assert held_memory(step, torch.device("cpu")) == 8000


@pytest.mark.usefixtures("no_device")
def test_gpu_without_a_device(run, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run("gpu", "--out", str(tmp_path / "gpu.json"))
    assert isinstance(stopped.value.code, str)  # which Python prints, and exits with 1
    assert "no CUDA device" in stopped.value.code
    assert "\n" not in stopped.value.code
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.usefixtures("benchmarks")
def test_gpu_runs_every_benchmark():
    from gpu import RUNS

    scripts = {path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    # The tables, context.py, icons.py, long_tail.py and rare.py measure learning; the others left out use no device.
    elsewhere = {
        "gpu.py",
        "table1.py",
        "table2.py",
        "table2_loss.py",
        "context.py",
        "convolutions.py",
        "icons.py",
        "long_tail.py",
        "photographs.py",
        "predicting.py",
        "rare.py",
        "convert.py",
        "loading.py",
        "annotations.py",
    }
    elsewhere |= {"export.py", "lvis_size.py", "scoring.py", "comparing.py", "instaboost.py", "ladder.py", "scaling.py"}
    assert scripts - elsewhere == {arguments[0] for arguments in RUNS.values()}


def test_convolutions(run, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.import_module("convolutions"), "WORK", 1)
    run("convolutions", "--small", "--threads=1", "--repeats=1", "--out", str(tmp_path / "c.json"))
    result = json.loads((tmp_path / "c.json").read_text())
    assert len(result["layers"]) == 5
    for row in result["layers"].values():
        assert row["speedup"]["processor"]["of_medians"] > 0
        assert row["ours"]["calls"] == row["PyTorch's"]["calls"] == 1


@pytest.mark.nightly
@pytest.mark.usefixtures("one_process")
def test_rows(run, tmp_path):
    narrow = ("model.backbone.name=resnet18", "model.backbone.pretrained=false", "model.neck.channels=16")
    narrow += (
        "model.box_head.width=16",
        "model.box_head.rois=16",
        "model.mask_head.channels=8",
        "test.max_detections=5",
    )
    narrow += ("model.tsd.shift_width=8", "model.mask_iou={channels: 8, width: 16}", "test.tta_long_edges=[64]")
    options = ["--size", "64", "96", "--batch=2", "--classes=5", "--repeats=1", "--threads=1", "--precision=fp32"]
    options += [*(f"--set={setting}" for setting in narrow), "--rows", "11-finetune", "12-tta"]
    run("rows", *options, "--out", str(tmp_path / "r.json"))
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    batches = {name: {task: found["batch"] for task, found in row.items()} for name, row in rows.items()}
    assert batches == {"11-finetune": {"train": 2, "infer": 2}, "12-tta": {"infer": 1}}
    for found in (*rows["11-finetune"].values(), *rows["12-tta"].values()):
        assert found["images_per_second"] == pytest.approx(found["batch"] / found["seconds"]["median"])


@pytest.mark.usefixtures("no_device")
def test_graphs_without_a_device(run, tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device"):
        run("graphs", "--out", str(tmp_path / "g.json"))


@pytest.mark.nightly
@pytest.mark.usefixtures("benchmarks")
def test_graphs_measures_two_equal_models():
    from graphs import measured
    from throughput import Settings

    narrow = (
        "model.backbone.name=tf_efficientnet_lite0",
        "model.backbone.pretrained=false",
        "model.neck.channels=16",
        "model.box_head={width: 16, rois: 16}",
    )
    narrow += ("model.mask_head.channels=8", "model.rpn.post_nms_train=50")
    made = {"device": "cpu", "batch": 1, "size": (64, 64), "classes": 5, "precision": "fp32", "threads": 1}
    settings = Settings(**made, pairs=0, objects=2, overrides=narrow)
    found = measured("01-mask-rcnn", settings, 1, None)
    assert found["largest_relative_difference_of_losses"] == 0
    assert found["with graphs"]["images_per_second"] == pytest.approx(1 / found["with graphs"]["seconds"]["median"])


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("found", [0, 2, 3, 4, 21, 32])
@pytest.mark.parametrize("bend", [0, 1, -1])  # memory grows a little faster, or slower, than two points tell
def test_the_largest_batch_is_found(found, bend):
    from rows import largest_batch

    def peak(images):
        return 100 + 10 * images + bend * images**2 / 20 if images <= 64 else float("inf")

    assert largest_batch(peak, int(peak(found)) + 1) == found


@pytest.mark.usefixtures("benchmarks")
def test_operations_of_the_ladder():
    """Those of a convolution and of a deformable one by hand; and what is recorded is what is counted."""
    import ladder
    from torchvision.ops import deform_conv2d

    with torch.device("meta"), ladder._Counter() as counter:
        x, weight = torch.empty(2, 6, 10, 12), torch.empty(8, 3, 3, 3)
        torch.nn.functional.conv2d(x, weight, padding=1, groups=2)
        plain = counter.get_total_flops()
        deform_conv2d(x, torch.empty(2, 18, 10, 12), weight, padding=1, mask=torch.empty(2, 9, 10, 12))
    assert plain == 2 * 2 * 8 * 10 * 12 * 3 * 9
    assert counter.get_total_flops() == 2 * plain
    recorded = costs()[0]
    for row in ("01-mask-rcnn", "08-neck"):
        parameters, flops = ladder.count(resolve(f"table2/{row}"), 1203)
        assert recorded[row].parameters == parameters
        assert recorded[row].teraflops == pytest.approx(flops / 1e12, abs=1e-3)


@pytest.mark.nightly
def test_instaboost(run, photographs, tmp_path):
    options = ["--images=0", "--data", str(photographs), "--sheet", str(tmp_path / "sheet.png")]
    run("instaboost", *options, "--out", str(tmp_path / "i.json"))
    cost = json.loads((tmp_path / "i.json").read_text())["cost"]
    assert cost["images"] == 4
    assert cost["pixels"]["seen_and_different"] == 0
    assert cost["pixels"]["hole"] > 4 * 300
    assert cost["times_as_long_as_without"].keys() == {"InstaBoost", "InstaBoost with heat map", "Copy-Paste"}
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_fpg(run, tmp_path):
    options = ["--size", "64", "96", "--batch=1", "--channels=32", "--repeats=1", "--threads=1"]
    run("fpg", *options, "--out", str(tmp_path / "f.json"))
    assert json.loads((tmp_path / "f.json").read_text())["machine"]["threads"] == 1


@pytest.mark.nightly
@pytest.mark.usefixtures("one_process")
def test_tta(run, tmp_path):
    narrow = (
        "model.backbone.name=resnet18",
        "model.neck.channels=16",
        "model.box_head.width=16",
        "test.max_detections=5",
    )
    options = [
        "--picture",
        "48",
        "64",
        "--edges",
        "64",
        "96",
        "--classes=7",
        "--pairs=20",
        "--repeats=1",
        "--threads=1",
    ]
    options += [f"--set={setting}" for setting in (*narrow, "model.mask_head.channels=8")]
    run("tta", *options, "--out", str(tmp_path / "t.json"))
    result = json.loads((tmp_path / "t.json").read_text())
    assert (result["views"], result["passes"]) == (4, 3 * 4 - 2)
    assert result["held_ratio"] < 1.3
    assert result["time_ratio"].keys() == {"clock", "processor"}


@pytest.mark.nightly
def test_finetune(run, tmp_path):
    options = ["--repeats=1", "--images=8", "--size=64", "--epochs=2", "--batch=2", "--threads=1"]
    options += ["--set=model.neck.channels=16", "--set=model.box_head.width=32", "--set=model.mask_head.channels=16"]
    options += ["--set=model.rpn.post_nms_train=50", "--set=model.rpn.post_nms_test=50"]
    run("finetune", *options, "--out", str(tmp_path / "f.json"))
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["same_bits"]
    assert result["views"] == 8
    assert result["bytes_per_view"] > 0


def test_nms(run, tmp_path):
    options = [
        "--boxes=60",
        "--rois=20",
        "--classes=30",
        "--repeats=1",
        "--threads=1",
        "--out",
        str(tmp_path / "n.json"),
    ]
    run("nms", *options)
    result = json.loads((tmp_path / "n.json").read_text())
    assert 0 < result["kept"] < 2 * 5 * 60
    assert result["other_than_list_by_list"] == {"ours": 0, "torchvision": 0, "float64": 0}
    assert result["same_detections"]
    assert result["proposals"].keys() == {"ours", "torchvision", "float64"}
    assert result["detections"].keys() == {"ours", "torchvision"}
    assert "waits" not in result


def test_roi_align(run, tmp_path):
    options = ["--size", "64", "96", "--rois=6", "--channels=4", "--stages=2", "--repeats=1", "--threads=1"]
    run("roi_align", *options, "--out", str(tmp_path / "r.json"))
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["largest_difference"] < 1e-3
    assert result["cases"].keys() == {"ours", "level by level", "torchvision"}
    assert "launches" not in result["cases"]["ours"]


@pytest.mark.usefixtures("one_process")
def test_carafe(run, tmp_path):
    options = ["--rois=2", "--channels=8", "--repeats=1", "--threads=1", "--out", str(tmp_path / "c.json")]
    run("carafe", *options)
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["largest_difference"] < 1e-5
    assert result["cases"].keys() == {"ours", "nearest", "textbook"}
    assert result["cases"]["textbook"]["memory_over_ours"] > 0


def test_tsd(run, tmp_path):
    options = ["--rois=16", "--size", "64", "96", "--channels=8", "--classes=5", "--width=16"]
    run("tsd", *options, "--repeats=1", "--threads=1", "--out", str(tmp_path / "t.json"))
    result = json.loads((tmp_path / "t.json").read_text())
    # Three branches where the plain head has one, and in training the sibling's too.
    assert result["train"]["operations_ratio"] > result["infer"]["operations_ratio"] > 1.5


@pytest.mark.nightly
def test_htc_lite(run, tmp_path):
    options = [option for option in TINY if option not in ("--models", "table1/seesaw")]
    options += ["--positives=8", "--set=model.rpn.post_nms_test=50", "--set=model.box_head.rois=32"]
    run("htc_lite", *options, "--out", str(tmp_path / "h.json"))
    result = json.loads((tmp_path / "h.json").read_text())
    ratios = list(result["parameters_ratio"].values())
    assert ratios[0] == 1
    assert 1 < ratios[1] < ratios[2]  # one mask head, three, three and what they tell each other
    assert len(result["train"]) == len(result["infer"]) == 3


@pytest.mark.nightly
def test_context(run, tmp_path):
    """Of a random encoder: detections with its vector, without it, and with another image's."""
    data = write_synthetic(
        tmp_path / "data", SyntheticSettings(classes=6, train_images=6, val_images=5, size=64, rarest=3)
    )
    recipe = resolve("demo-table2/04-htc-lite", ["model.backbone.pretrained=false", "test.max_detections=5"])
    val = open_splits(data).val
    torch.manual_seed(0)
    save_model(tmp_path / "m.safetensors", build_detector(recipe, len(val.categories)), recipe, val.categories, step=0)
    options = ["--data", str(data), "--threads=1", "--out", str(tmp_path / "c.json")]
    run("context", str(tmp_path / "m.safetensors"), *options)
    (model,) = json.loads((tmp_path / "c.json").read_text())["models"].values()
    assert model["detection"].keys() == {"own", "zeroed", "shuffled"}


def test_rle(run, tmp_path):
    run("rle", "--detections=20", "--size", "60", "80", "--repeats=1", "--out", str(tmp_path / "r.json"))
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["pixels_that_differ"]["of_all"] < 1e-4
    assert result["speedup"]["painted and encoded"]["clock"]["of_medians"] > 0


@pytest.mark.nightly
@pytest.mark.usefixtures("one_process")
def test_scoring(run, monkeypatch, tmp_path):
    """Of the five commands only the measured one, scoring all detections, is a process of its own."""
    import scoring

    measured, commands = scoring.run, []

    def here(python: str, option: str, *command: str) -> tuple[float, int]:
        commands.append((option, *command))
        if len(commands) == 5:
            return measured(python, option, *command)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, "float", float, raising=False)  # as the script for lvis-api sets it
            if option == "-m":
                assert command[0] == "tailseg"
                assert tailseg(*command[1:]).returncode == 0
            else:
                patch.setattr(sys, "argv", ["-c", *command[1:]])
                exec(command[0], {"__name__": "__main__"})
        return 1.0, 1

    monkeypatch.setattr(scoring, "run", here)
    options = ["--images=40", "--detections=20", "--repeats=1", "--out", str(tmp_path / "s.json")]
    run("scoring", *options)
    result = json.loads((tmp_path / "s.json").read_text())
    assert [command[2] for command in commands if command[0] == "-m"] == ["score"] * 2
    assert result["tenth"]["difference"] < 1e-9
    assert result["all"]["detections"] == 800
    assert result["all"]["ours"]["peak_bytes"] > 0


@pytest.mark.usefixtures("one_process")
def test_comparing(run, monkeypatch, tmp_path):
    import comparing

    def here(_python: str, _option: str, _package: str, *command: str) -> tuple[float, int]:
        done = tailseg(*command)
        assert done.returncode == 0, done.stderr
        return 2.0, 1

    monkeypatch.setattr(comparing, "run", here)
    run("comparing", "--images=20", "--detections=20", "--out", str(tmp_path / "c.json"))
    result = json.loads((tmp_path / "c.json").read_text())
    assert (result["detections"], result["sets"]) == (400, 1000)
    assert result["largest_difference_to_score"] == 0
    assert result["speedup"] == 2000  # a score took as long as the comparison


@pytest.fixture
def photographs(tmp_path):
    """A training split of four JPEGs, each with a triangle and, of two parts, a square."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = cv2.resize(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{i}.jpg")
        content["images"].append({"id": i, "height": 48, "width": 64, "file_name": f"{i}.jpg"})
        for label, box, parts in (
            (1, [4, 4, 20, 30], [[4.0, 4, 24, 4, 24, 34]]),
            (2, [30, 10, 20, 20], [[30.0, 10, 50, 10, 50, 20, 30, 20], [30.0, 20, 50, 20, 50, 30, 30, 30]]),
        ):
            shape = {"bbox": box, "area": box[2] * box[3], "segmentation": parts}
            content["annotations"].append({"id": 2 * i + label, "image_id": i, "category_id": label} | shape)
    (tmp_path / "data" / "train.json").write_text(json.dumps(content))
    return tmp_path / "data"


def test_loading(run, photographs, tmp_path):
    tiny = ["--batches=1", "--repeats=1", "--workers=0", "--data", str(photographs)]
    run("loading", *tiny, "--out", str(tmp_path / "l.json"))
    result = json.loads((tmp_path / "l.json").read_text())
    for block in ("1x", "45e", "1x, enlarged"):
        rows = list(result[block].values())
        assert len(rows) == 4
        assert all(row["images_per_second"] > 0 for row in rows)
        assert all(row["ours_is_faster_by"]["clock"]["of_medians"] > 0 for row in rows[1:])


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("pillow", [True, False])
def test_the_loader_that_we_compare_with_gives_the_same_samples(photographs, pillow):
    from loading import Reference

    recipe = DataRecipe(short_edges=(96,), flip=1.0)
    ours = train_dataset(open_splits(photographs, need=("train",)).train, recipe)
    theirs = Reference(ours, recipe, pillow=pillow)
    for i in range(4):
        sample, (image, target) = ours[i, 0], theirs[i, 0]
        assert image.shape == sample.image.shape == (3, 96, 128)
        assert image.dtype == torch.uint8
        assert (image.int() - sample.image.int()).abs().double().mean() < 1  # of 255: two bilinear filters
        assert target["labels"].tolist() == sample.instances.labels.tolist() == [0, 1]
        torch.testing.assert_close(target["boxes"], sample.instances.boxes)
        assert target["masks"].shape == (2, 96, 128)
        assert int(target["masks"][1].sum()) == 40 * 40


@pytest.mark.usefixtures("benchmarks")
def test_outcomes_of_a_test_report(tmp_path):
    from gpu import outcomes

    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"/><testcase classname="a" name="y"><failure/>'
        '</testcase><testcase classname="b" name="z"><skipped message="m"/></testcase></testsuite></testsuites>'
    )
    assert outcomes(report) == {"passed": 1, "failed": ["a.y"], "skipped": ["b.z"]}


@pytest.mark.usefixtures("benchmarks")
def test_speedup_by_hand():
    from harness import Times, speedup

    ours, theirs = [Times(1, 1), Times(2, 1), Times(4, 1)], [Times(4, 3), Times(6, 3), Times(8, 3)]
    assert speedup(ours, theirs) == {
        "clock": {"of_medians": 3.0, "smallest": 2.0, "largest": 4.0},
        "processor": {"of_medians": 3.0, "smallest": 3.0, "largest": 3.0},
    }


@pytest.mark.usefixtures("benchmarks")
def test_twin_computes_what_we_do():
    from torchvision_twin import build_twin, twin_inputs

    torch.manual_seed(0)
    settings = ("test.max_detections=5", "model.rpn.post_nms_test=20")
    detector = build_detector(override(resolve("table1/cross-entropy"), settings), 4).eval()
    twin = build_twin(detector, (64, 96)).eval()
    from throughput import Settings, scene

    batch, masks = scene(
        Settings(
            device="cpu",
            batch=1,
            size=(64, 96),
            classes=4,
            precision="fp32",
            pairs=0,
            objects=2,
            overrides=(),
            threads=1,
        )
    )
    images, targets = twin_inputs(batch, masks)
    assert (targets[0]["labels"] == batch.labels[0] + 1).all()
    with torch.no_grad():
        ours = detector.pyramid(batch.images, batch.image_sizes)
        theirs = list(twin.backbone(twin.transform(images)[0].tensors).values())
        rows = torch.rand(3, 256, 7, 7)
        ours_of_rows = detector.stages[0].box_head(lambda _rois: rows, torch.zeros(3, 5))
        their_logits, their_deltas = twin.roi_heads.box_predictor(twin.roi_heads.box_head(rows))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    torch.testing.assert_close(ours_of_rows.logits, their_logits.roll(-1, 1))
    torch.testing.assert_close(ours_of_rows.deltas, their_deltas.view(3, 5, 4)[:, 1:])
    trained = {n for n, p in detector.backbone.net.named_parameters() if p.requires_grad and "bn" not in n}
    assert {n for n in trained if "conv" in n} == {
        n for n, p in twin.backbone.body.named_parameters() if p.requires_grad and "conv" in n
    }

"""The command, its refusals, and the other formats."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import assert_done, assert_refused, tailseg

import tailseg as package
from tailseg.predict.model import load


def test_predict_writes_the_same(onnx_file: Path, model: Path, photo: Path, tmp_path: Path) -> None:
    for name, file in (("ours", model), ("exported", onnx_file)):
        assert_done(tailseg("predict", file, photo, "--score", 0.1, "--out", tmp_path / name, "--quiet"))
    ours, exported = (json.loads((tmp_path / name / "photo.json").read_text()) for name in ("ours", "exported"))
    assert len(ours["detections"]) > 2
    assert [row["category_id"] for row in exported["detections"]] == [row["category_id"] for row in ours["detections"]]
    assert (tmp_path / "exported" / "photo.png").is_file()


def test_eval_scores_the_same(onnx_file: Path, model: Path, tmp_path: Path) -> None:
    ids = [3, 10, 17]
    images = [{"id": 1, "file_name": "a.png", "height": 60, "width": 80, "neg_category_ids": [],
               "not_exhaustive_category_ids": []}]  # fmt: skip
    objects = [
        {"id": i + 1, "image_id": 1, "category_id": one, "bbox": [5 + 20 * i, 5, 20, 30], "area": 600, "iscrowd": 0,
         "segmentation": [[5 + 20 * i, 5, 25 + 20 * i, 5, 25 + 20 * i, 35, 5 + 20 * i, 35]]}
        for i, one in enumerate(ids)
    ]  # fmt: skip
    names = ("owl", "<b>", "päärynä")
    categories = [{"id": one, "name": name, "frequency": "f"} for one, name in zip(ids, names, strict=True)]
    (tmp_path / "images").mkdir()
    from PIL import Image

    pixels = np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    content = {"images": images, "annotations": objects, "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(content))
    metrics = []
    for file in (model, onnx_file):
        out = tmp_path / file.suffix
        assert_done(tailseg("eval", file, "--data", tmp_path, "--out", out, "--quiet"))
        metrics.append(json.loads((out / "metrics.json").read_text()))
        assert len(json.loads((out / "detections.json").read_text())) > 3
    assert metrics[0] == metrics[1]
    # Of an image the best two count: the model keeps no more, the export finds as many as ever.
    limited = []
    for file in (model, onnx_file):
        out = tmp_path / f"limited{file.suffix}"
        assert_done(tailseg("eval", file, "--data", tmp_path, "--out", out, "--max-dets", 2, "--quiet"))
        limited.append(json.loads((out / "metrics.json").read_text()))
    for exported in (onnx_file, load(onnx_file)):
        found = package.evaluate(exported, tmp_path, tmp_path / "python", max_dets=2, show=False)
        limited.append(found.metrics)
    assert limited == [limited[0]] * 4
    assert "AR2" in limited[0]["segm"]


@pytest.mark.nightly
def test_torch_program(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    assert_done(tailseg("export", model, "--format", "torch", "--size", 64, 64, "--out", out))
    texts = {"tailseg.classes": ""}
    program = torch.export.load(out, extra_files=texts)
    assert [row["id"] for row in json.loads(texts["tailseg.classes"])] == [3, 10, 17]
    assert not [node for node in program.graph.nodes if "tailseg" in str(node.target)]
    picture = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = package.load(model).predict(picture)
    found = program.module()(torch.from_numpy(picture).permute(2, 0, 1).contiguous(), torch.tensor([64, 64]))
    torch.testing.assert_close(found[0], expected.boxes, rtol=0, atol=0.05)
    assert found[2].tolist() == expected.labels.tolist()
    torch.testing.assert_close(found[3], expected.raw.masks, rtol=0, atol=1e-3)


def test_openvino(onnx_file: Path, model: Path, folder: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from tailseg.export.job import about_model, write_openvino

    out = folder / "model.xml"
    level = logging.getLogger().level
    files = write_openvino(onnx_file, out, about_model(load(model), None), half=False)
    assert [file.suffix for file in files] == [".xml", ".bin"]
    assert logging.getLogger().level == level  # OpenVINO would raise it for everyone
    core = openvino.Core()
    loaded = core.read_model(out)
    assert [row["id"] for row in json.loads(loaded.get_rt_info(["tailseg", "classes"]).astype(str))] == [3, 10, 17]
    compiled = core.compile_model(loaded, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for image_hw in ((64, 64), (32, 64)):
        picture = np.random.default_rng(5).integers(0, 256, (*image_hw, 3), dtype=np.uint8)
        expected = package.load(model).predict(picture)
        found = compiled([np.ascontiguousarray(picture.transpose(2, 0, 1)), np.array(image_hw)])
        boxes, scores, labels, masks = (found[name] for name in ("boxes", "scores", "labels", "masks"))
        assert labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(boxes, expected.boxes.numpy(), atol=0.05)
        np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-4)
        np.testing.assert_allclose(masks, expected.raw.masks.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--format", "tflite", "--out", "m.tflite"), ("--format tflite", "onnx, torch, openvino")),
        (("--out", "m.pt2"), ("--out m.pt2", "ends in .onnx; name it m.onnx")),
        (("--out", "no/m.onnx"), ("--out no/m.onnx", "its folder is not there")),
        (("--size", 100, 0, "--out", "m.onnx"), ("--size 100 0", "multiples of 32", "--size 128 32")),
        (("--format", "torch", "--half", "--out", "m.pt2"), ("--half",)),
        (("--set", "model.neck.channels=8", "--out", "m.onnx"), ("model.neck.channels",)),
    ],
)
def test_refusals(model: Path, tmp_path: Path, options: tuple[object, ...], named: tuple[str, ...]) -> None:
    assert_refused(tailseg("export", model, *options, cwd=tmp_path), *named)
    assert not list(tmp_path.iterdir())


def test_one_size_or_any(model: Path, tmp_path: Path) -> None:
    done = tailseg("export", model, "--size", 64, 64, "--dynamic", "--out", tmp_path / "m.onnx")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_missing_packages(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    done = tailseg("export", model, "--out", tmp_path / "m.onnx")
    assert_refused(done, "needs onnx and onnxscript", "pip install 'tailseg[export]'")


def test_settings_of_an_exported_model(onnx_file: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(tailseg("predict", onnx_file, photo, "--tta", "--out", out), "has the settings of its export")
    assert_refused(tailseg("predict", onnx_file, photo, "--device", "cuda:7", "--out", out), "cuda:7")
    assert_refused(tailseg("export", onnx_file, "--out", tmp_path / "m.onnx"), "is an exported model already")

"""An exported file beside the model that it was exported from."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import CATEGORIES, made_model
from tiny import assert_done, tailseg

import tailseg as package
from tailseg.errors import UserError
from tailseg.export.job import about_model, write_openvino
from tailseg.results.detections import Detections


def assert_same(found: Detections, expected: Detections) -> None:
    assert found.labels.tolist() == expected.labels.tolist()
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0.05)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.raw.masks, expected.raw.masks, rtol=0, atol=1e-3)
    assert (found.mask_scores is None) == (expected.mask_scores is None)
    if found.mask_scores is not None and expected.mask_scores is not None:
        torch.testing.assert_close(found.mask_scores, expected.mask_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("image_hw", [(60, 80), (100, 64), (33, 200), (8, 64)])
def test_pictures_of_any_size(onnx_file: Path, model: Path, image_hw: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (*image_hw, 3), dtype=np.uint8)
    expected = package.load(model).predict(picture)
    assert len(expected) > 3
    assert_same(package.load(onnx_file).predict(picture), expected)


ALL_PARTS = (
    "model.stages=[{iou: 0.5, stds: [0.1, 0.1, 0.2, 0.2], weight: 1.0, mask_weight: 1.0, tsd: true}]",
    "model.backbone.deformable_stages=[4]",
    "finetune.enabled=true",
    "data.test_short_edge=128",
    "data.long_edge=128",
)


@pytest.mark.nightly
def test_many_parts_at_one_size_in_16_bits(folder: Path) -> None:
    """Context encoder, TSD, CARAFE, deformable convolution, mask scoring and two classifiers."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = made_model(folder / "all.safetensors", "demo-table2/06-mask-scoring", *ALL_PARTS)
    out = folder / "all.onnx"
    assert_done(tailseg("export", model, "--size", 128, 128, "--out", out, "--half"))
    assert out.stat().st_size < 0.62 * model.stat().st_size
    ours = package.load(model)
    with torch.no_grad():
        for weight in ours.detector.parameters():
            if weight.numel() >= 1024:
                weight.copy_(weight.half())
    exported = package.load(out)
    for image_hw in ((128, 100), (100, 100)):  # padded to all of the input by PyTorch too
        picture = np.random.default_rng(2).integers(0, 256, (*image_hw, 3), dtype=np.uint8)
        expected = ours.predict(picture)
        assert expected.mask_scores is not None
        assert len(expected) > 3
        assert_same(exported.predict(picture), expected)
    pytest.importorskip("openvino")
    with pytest.raises(UserError, match=r"OpenVINO cannot read this model's DeformConv.*--format onnx"):
        write_openvino(out, folder / "all.xml", about_model(ours, (128, 128)), half=False)


def test_what_the_file_says(onnx_file: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file.read_bytes(), providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    assert set(texts) == {f"tailseg.{key}" for key in ("format", "version", "classes", "recipe", "input")}
    assert [row["name"] for row in json.loads(texts["tailseg.classes"])] == [c.name for c in CATEGORIES]
    about = json.loads(texts["tailseg.input"])
    assert (about["short_edge"], about["long_edge"], about["divisor"], about["size"]) == (64, 64, 32, None)
    assert about["mean"] == [123.675, 116.28, 103.53]
    assert json.loads(texts["tailseg.recipe"])["name"] == "demo-table2/01-mask-rcnn"


def test_choosing_among_what_is_found(onnx_file: Path, model: Path, photo: Path) -> None:
    ours, exported = package.load(model), package.load(onnx_file)
    some = ours.predict(photo)
    middle = float(some.scores[len(some) // 2])
    for options in ({"score": middle}, {"max_detections": 2}):
        assert_same(exported.predict(photo, **options), ours.predict(photo, **options))
    found = exported.predict(photo, classes="owl")
    assert set(found.names) <= {"owl"}
    assert len(found) == some.names.count("owl")


def test_a_loaded_export_keeps_its_settings(onnx_file: Path) -> None:
    own = package.load(onnx_file).recipe
    same = [f"test.nms_iou={own.test.nms_iou}", f"test.max_detections={own.test.max_detections}"]
    assert package.load(onnx_file, settings=same).recipe == own
    with pytest.raises(UserError, match=r"^--set test\.nms_iou=0\.65: .* has the settings of its export"):
        package.load(onnx_file, settings=[*same, "test.nms_iou=0.65"])

"""`tailseg.runtime`: exported files without PyTorch, and files that are not what they seem."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import assert_refused, tailseg

import tailseg as package
from tailseg import runtime
from tailseg.errors import UserError
from tailseg.runtime import other_files

WITHOUT_TORCH = """
import json, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "onnx", "onnxscript"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refused())
from tailseg.runtime import load
found = load(sys.argv[1]).predict(sys.argv[2], score=float(sys.argv[3]))
rows = dict(boxes=found.boxes.tolist(), scores=found.scores.tolist(), labels=found.labels.tolist(), rles=found.rles())
json.dump(rows, sys.stdout)
"""


def test_without_pytorch(onnx_file: Path, model: Path, photo: Path) -> None:
    expected = package.load(model).predict(photo)
    score = float(expected.scores[-1]) - 1e-4
    line = [sys.executable, "-c", WITHOUT_TORCH, str(onnx_file), str(photo), str(score)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["labels"] == expected.labels.tolist()
    np.testing.assert_allclose(found["boxes"], expected.boxes.numpy(), atol=0.05)
    np.testing.assert_allclose(found["scores"], expected.scores.numpy(), atol=1e-4)
    assert [rle["size"] for rle in found["rles"]] == [[*expected.image_hw]] * len(expected)


def test_arrays(onnx_file: Path, photo: Path) -> None:
    model = runtime.load(onnx_file, threads=1)
    assert model.names == ["owl", "<b>", "päärynä"]
    assert model.category_ids == [3, 10, 17]
    picture = package.load(onnx_file).predict(photo).picture
    one, other = model.predict(picture), model.predict(photo)
    assert one.image_hw == (180, 240)
    assert len(one) > 3
    np.testing.assert_array_equal(one.boxes, other.boxes)
    assert len(model.predict(picture, score=1.0)) == 0
    assert model.predict(picture, score=1.0).rles() == []
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8 RGB"):
        model.predict(picture[..., 0])


def edited(onnx_file: Path, out: Path, **texts: str | None) -> Path:
    import onnx

    content = onnx.load(onnx_file)
    kept = {entry.key: entry.value for entry in content.metadata_props} | {f"tailseg.{k}": v for k, v in texts.items()}
    onnx.helper.set_model_props(content, {key: value for key, value in kept.items() if value is not None})
    onnx.save(content, out)
    return out


DEEP = "[" * 200_000
CLASS = {"id": 1, "name": "a", "frequency": "r", "image_count": 1, "instance_count": 1}


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ({"format": None}, "is no model that `tailseg export` wrote"),
        ({"format": "2"}, "has a format that this version cannot read"),
        ({"recipe": "{}"}, None),
        ({"recipe": DEEP}, "its metadata are damaged"),
        ({"classes": '[{"id": "1"}]'}, "a class is not made of id, name"),
        ({"classes": json.dumps([CLASS | {"frequency": "z"}])}, "a class has a frequency that is none of r, c and f"),
        ({"classes": json.dumps([CLASS])}, "finds classes that it does not name"),
        ({"input": "[]"}, "its metadata are damaged"),
        ({"input": '{"short_edge": 0}'}, "its metadata are damaged"),
        ({"version": "x" * (17 << 20)}, "its metadata are too large"),
    ],
)
def test_edited_files(onnx_file: Path, photo: Path, tmp_path: Path, texts: dict[str, str | None], told: str | None):
    path = edited(onnx_file, tmp_path / "edited.onnx", **texts)
    if told is not None:
        with pytest.raises(UserError, match=told) as refused:
            runtime.load(path).predict(photo)
        assert str(path) in str(refused.value)
    assert_refused(tailseg("predict", path, photo, "--out", tmp_path / "out", "--quiet"), str(path))


def test_damaged_and_foreign_files(onnx_file: Path, photo: Path, tmp_path: Path) -> None:
    content = onnx_file.read_bytes()
    damaged = {
        "empty.onnx": (b"", "is no ONNX file"),
        "half.onnx": (content[: len(content) // 2], "is no ONNX file"),
        "text.onnx": (b"not a model\n" * 99, "is no ONNX file"),
        "elsewhere.onnx": (content + b"\x0a\x08location\x12\x0b/etc/passwd", "keeps weights in other files"),
    }
    for name, (damage, told) in damaged.items():
        (tmp_path / name).write_bytes(damage)
        assert_refused(tailseg("predict", tmp_path / name, photo, "--out", tmp_path / "out"), name, told)
    assert_refused(tailseg("predict", tmp_path / "none.onnx", photo), "there is no such file")


def test_weights_in_other_files(onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.onnx"
    onnx.save(onnx.load(onnx_file), path, save_as_external_data=True, location="weights", size_threshold=1024)
    with pytest.raises(UserError, match="keeps weights in other files"):
        runtime.load(path)


def value_first(entry: bytes) -> bytes:
    """A key and its value in the other order, which protocol buffers allow."""
    size = 2 + entry[1]
    return entry[size:] + entry[:size]


@pytest.mark.parametrize("place", ["initializer", "sparse", "attribute", "attributes", "subgraph", "function"])
def test_weights_in_other_files_wherever_they_are_named(onnx_file: Path, tmp_path: Path, place: str) -> None:
    """In no order that a search for bytes would find: the value stands before its key."""
    import onnx
    from onnx import TensorProto, helper

    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "weights"
    node = helper.make_node("Constant", [], ["x"])
    content = onnx.load(onnx_file)
    if place == "initializer":
        content.graph.initializer.append(tensor)
    elif place == "sparse":
        content.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif place == "subgraph":
        inner = helper.make_graph([node], "inner", [], [], initializer=[tensor])
        content.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    else:
        attribute = node.attribute.add()
        attribute.name = "value"
        if place == "attributes":
            attribute.tensors.append(tensor)
        else:
            attribute.t.CopyFrom(tensor)
        content.functions.add().node.append(node) if place == "function" else content.graph.node.append(node)
    told = entry.SerializeToString()
    swapped = content.SerializeToString().replace(told, value_first(told))
    assert onnx.load_from_string(swapped) == content
    assert b"\x0a\x08location\x12" not in swapped
    (tmp_path / "weights").write_bytes(b"\0" * 4)
    (tmp_path / "model.onnx").write_bytes(swapped)
    with pytest.raises(UserError, match="keeps weights in other files"):
        runtime.load(tmp_path / "model.onnx")


def test_fields_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_files, "MOST_FIELDS", 9)
    assert not other_files.has_weights_elsewhere(b"\x08\x0a" * 9)
    with pytest.raises(ValueError, match="more than 9 fields"):
        other_files.has_weights_elsewhere(b"\x08\x0a" * 10)


def test_operators_of_others(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("image", TensorProto.UINT8, [3, 32, 32])
    out = helper.make_tensor_value_info("boxes", TensorProto.UINT8, None)
    node = helper.make_node("Run", ["image"], ["boxes"], domain="evil")
    graph = helper.make_graph([node], "g", [value], [out])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("evil", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "evil.onnx")
    with pytest.raises(UserError, match="is no ONNX file that onnxruntime can run"):
        runtime.load(tmp_path / "evil.onnx")

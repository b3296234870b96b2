"""An exported program as an ONNX file that carries what its user needs to know."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from tailseg.export.program import INPUTS
from tailseg.model.traceable import keep_within_classes

OPSET = 20  # the first in which sampling of grids and deformable convolutions are as PyTorch's
MOST_KEPT = 2**31 - 1
LARGE = 1024  # values of a weight that is worth halving


def write_onnx(
    program: ExportedProgram, path: Path, outputs: Sequence[str], about: Mapping[str, str], *, half: bool
) -> None:
    """Write a program of `tailseg.export.program.trace`.

    Args:
        program: traced.
        path: of the file.
        outputs: names of what it returns.
        about: texts that the file carries.
        half: store weights in 16 bits; they are turned into 32 when the file is loaded.
    """
    with warnings.catch_warnings(action="ignore"):  # about sizes that are no constants, which they are not meant to be
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=outputs,
            custom_translation_table={keep_within_classes._opoverload: _nms},
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    model = exported.model
    model.metadata_props.clear()  # the tracer's notes
    model.metadata_props.update(about)
    for node in model.graph:
        node.metadata_props.clear()  # places in our source
        node.doc_string = None
    if half:
        _halve(model)
    exported.save(path, external_data=False)


def _nms(boxes: Any, scores: Any, labels: Any, num_classes: int, iou: float) -> Any:
    """`keep_within_classes` in ONNX's operators; theirs drops scores of 0, as ours does."""
    from onnxscript import opset20 as op

    classes = op.Constant(value_ints=list(range(num_classes)))
    own = op.Equal(op.Unsqueeze(classes, [1]), op.Unsqueeze(labels, [0]))
    by_class = op.Where(own, op.Unsqueeze(scores, [0]), op.Constant(value_float=0.0))
    picked = op.NonMaxSuppression(
        op.Unsqueeze(boxes, [0]),
        op.Unsqueeze(by_class, [0]),
        op.Constant(value_ints=[MOST_KEPT]),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[0.0]),
    )
    places = op.Gather(picked, op.Constant(value_ints=[2]), axis=1)  # (n, 1)
    ones = op.Expand(op.Constant(value_int=1), op.Slice(op.Shape(places), [0], [1]))
    return op.Greater(op.ScatterND(op.Mul(labels, op.Constant(value_int=0)), places, ones), op.Constant(value_int=0))


def _halve(model: Any) -> None:
    """Store large weights in 16 bits, each followed by its conversion back."""
    import onnx_ir as ir

    casts = []
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < LARGE:
            continue
        numbers = tensor.numpy().astype("float16")
        name = value.name
        value.name = f"{name}.half"
        value.const_value = ir.tensor(numbers, name=value.name)
        value.dtype = ir.DataType.FLOAT16
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].name = name
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        casts.append(cast)
    model.graph.insert_before(model.graph[0], casts)

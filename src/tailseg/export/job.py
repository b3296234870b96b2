"""The command `tailseg export`: a trained model written for another runtime."""

from __future__ import annotations

import importlib.util
import logging
import re
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from tailseg.errors import UserError
from tailseg.export.onnx_file import write_onnx
from tailseg.export.program import MOST_CELLS, output_names, trace
from tailseg.files import writing
from tailseg.model.detector import Detector
from tailseg.model.traceable import keep_within_classes, kept_within_classes
from tailseg.predict.model import Model
from tailseg.runtime.about import About

logger = logging.getLogger(__name__)

# What each format is written with, and the suffix of its file.
NEEDS = {"onnx": ("onnx", "onnxscript"), "torch": (), "openvino": ("onnx", "onnxscript", "openvino")}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}


def export(
    model: Model, kind: str, out: str | Path, *, size: tuple[int, int] | None = None, half: bool = False
) -> tuple[Path, ...]:
    """Write the whole detector of a model, from a picture to boxes, scores, classes and masks.

    Args:
        model: see `tailseg.load`.
        kind: ``onnx``, ``torch`` (an exported program of `torch.export`) or ``openvino``.
        out: the file; its suffix is .onnx, .pt2 or .xml.
        size: (height, width) in pixels that all pictures are fitted into and padded to; None takes any size.
        half: store the weights in 16 bits; computations stay in 32.

    Returns:
        The files: one, for OpenVINO the weights (.bin) too.

    Raises:
        UserError: the model is an exported one, the format or suffix is another, the size does not fit the model, a
            package is missing, or the folder of the file.
    """
    out = Path(out)
    detector = model.detector
    if not isinstance(detector, Detector):
        raise UserError(f"{model.path}: is an exported model already; give the model that it was exported from")
    _require(kind, out, half=half)
    about = about_model(model, size)
    if model.recipe.test.tta:
        logger.warning("test.tta: views are not exported; the exported model looks at each picture once.")
    program = trace(detector, size)
    names, texts = output_names(detector), about.texts()
    with writing(out), tempfile.TemporaryDirectory(prefix=".tailseg-", dir=out.parent) as scratch:
        part = Path(scratch) / out.name
        written: tuple[Path, ...] = (part,)
        if kind == "torch":
            plain = program.run_decompositions({keep_within_classes._opoverload: kept_within_classes})
            torch.export.save(plain, part, extra_files=texts)
        elif kind == "onnx":
            write_onnx(program, part, names, texts, half=half)
        else:
            write_onnx(program, part.with_suffix(".onnx"), names, texts, half=False)
            written = write_openvino(part.with_suffix(".onnx"), part, about, half=half)
        return tuple(file.replace(out.parent / file.name) for file in written)


def write_openvino(onnx_file: Path, out: Path, about: About, *, half: bool) -> tuple[Path, ...]:
    """Convert an ONNX file of ours to OpenVINO's: ``out`` (.xml) and its weights (.bin).

    Raises:
        UserError: OpenVINO lacks an operator, as that of deformable convolutions.
    """
    import openvino

    root = logging.getLogger()
    level = root.level
    try:
        converted = openvino.convert_model(onnx_file)
    except Exception as error:  # OpenVINO raises types of its own
        lacking = re.search(r"No conversion rule found for operations: (.*)", str(error))
        if lacking is None:
            raise
        raise UserError(
            f"--format openvino: OpenVINO cannot read this model's {lacking[1].strip()}; export it with --format onnx"
        ) from error
    finally:
        root.setLevel(level)  # OpenVINO silences everyone's warnings
    for key, text in about.texts().items():
        converted.set_rt_info(text, ["tailseg", key.partition(".")[2]])
    openvino.save_model(converted, out, compress_to_fp16=half)
    return out, out.with_suffix(".bin")


def about_model(model: Model, size: tuple[int, int] | None) -> About:
    """What an exported file says of its model.

    Raises:
        UserError: the size does not fit the model.
    """
    detector, data, test = model.detector, model.recipe.data, model.recipe.test
    assert isinstance(detector, Detector)
    if size is not None:
        _require_size(size, detector.divisor)
    return About(
        version=version("tailseg"),
        classes=[asdict(category) for category in model.categories],
        short_edge=data.test_short_edge,
        long_edge=data.long_edge,
        divisor=detector.divisor,
        size=size,
        mean=list(model.recipe.model.pixel_mean),
        std=list(model.recipe.model.pixel_std),
        score_threshold=test.score_threshold,
        nms_iou=test.nms_iou,
        max_detections=test.max_detections,
        recipe=model.recipe.model_dump(mode="json"),
    )


def _require_size(size: tuple[int, int], divisor: int) -> None:
    most = divisor * MOST_CELLS
    if not all(divisor <= side <= most and side % divisor == 0 for side in size):
        height, width = (max(divisor, min(most, -(-side // divisor) * divisor)) for side in size)
        raise UserError(
            f"--size {size[0]} {size[1]}: this model takes multiples of {divisor} from {divisor} to {most}; "
            f"the nearest is --size {height} {width}"
        )


def _require(kind: str, out: Path, *, half: bool) -> None:
    if kind not in NEEDS:
        raise UserError(f"--format {kind[:40]}: there is no such format; choose from {', '.join(NEEDS)}")
    if half and kind == "torch":
        raise UserError("--half: is for onnx and openvino; a program of PyTorch keeps its weights as they are")
    if out.suffix != SUFFIXES[kind]:
        raise UserError(f"--out {out}: a file of {kind} ends in {SUFFIXES[kind]}; name it {out.stem}{SUFFIXES[kind]}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: its folder is not there; make it, or name another")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    missing = [package for package in NEEDS[kind] if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--format {kind}: needs {' and '.join(missing)}; pip install 'tailseg[export]'")

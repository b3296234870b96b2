"""An ONNX file of `tailseg export` run by onnxruntime on the CPU, with our own pre- and post-processing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tailseg.data.images import fitted_size, read_image
from tailseg.errors import UserError
from tailseg.layers.paste import Rle, encode_masks
from tailseg.runtime.about import About, read_about
from tailseg.runtime.other_files import has_weights_elsewhere

if TYPE_CHECKING:
    import onnxruntime

MOST_BYTES = 2 << 30  # of a file: ONNX's own limit
ELSEWHERE = b"\x0a\x08location\x12"  # in most files whose weights lie in other files
INPUTS = {"image": "tensor(uint8)", "image_size": "tensor(int64)"}
OUTPUTS = ("boxes", "scores", "labels", "masks")

Picture = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """The objects found in a picture, best score first; N objects."""

    image_hw: tuple[int, int]  # pixels, of the picture
    boxes: NDArray[np.float32]  # (N, 4) xyxy in pixels of the picture
    scores: NDArray[np.float32]  # (N,) in [0, 1]
    labels: NDArray[np.int64]  # (N,) positions in the model's classes
    masks: NDArray[np.float32]  # (N, M, M) in [0, 1]: probabilities on a grid over the box
    mask_scores: NDArray[np.float32] | None = None  # (N,) scores that rank masks; None: use `scores`

    def __len__(self) -> int:
        return len(self.labels)

    def rles(self) -> list[Rle]:
        """The masks in pixels of the picture as COCO's run-length codes."""
        return encode_masks(self.masks, self.boxes, self.image_hw)


class OnnxModel:
    """A model that `tailseg export --format onnx` wrote.

    Nothing of the file but ONNX's own operators is run: it can name neither libraries nor other files.

    Args:
        path: of the file.
        threads: of the processor; None takes all.

    Raises:
        UserError: the file is missing, damaged, or no such model, or onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(path)
        self._session = _session(self.path, threads)
        self.about: About = read_about(self._session.get_modelmeta().custom_metadata_map, self.path)
        inputs = {value.name: value.type for value in self._session.get_inputs()}
        outputs = tuple(value.name for value in self._session.get_outputs())
        if inputs != INPUTS or outputs[:4] != OUTPUTS:
            raise UserError(f"{self.path}: its inputs or outputs are not those of a tailseg model; export it again")

    @property
    def names(self) -> list[str]:
        """Class names by label."""
        return [row["name"] for row in self.about.classes]

    @property
    def category_ids(self) -> list[int]:
        """Category ids by label, as in the annotation file that the model was trained on."""
        return [row["id"] for row in self.about.classes]

    def predict(self, picture: str | Path | Picture, *, score: float | None = None) -> Found:
        """The objects of a picture.

        Args:
            picture: path of an image file, or (H, W, 3) uint8 RGB.
            score: lowest score; None takes that of the exported recipe, below which nothing is found.

        Raises:
            UserError: the file cannot be read.
            ValueError: an array of another shape or type.
        """
        pixels = picture if isinstance(picture, np.ndarray) else read_image(Path(picture))
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            raise ValueError(f"expected (H, W, 3) uint8 RGB, received {pixels.shape} {pixels.dtype}")
        image_hw = (pixels.shape[0], pixels.shape[1])
        height, width = fitted_size(image_hw, self.about.short_edge, self.about.long_edge, self.about.size)
        if (height, width) != image_hw:
            pixels = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
        image = self.padded(pixels.transpose(2, 0, 1))
        boxes, scores, labels, masks, *own = self.run(image, (height, width))
        factors = (np.array(image_hw) / (height, width))[[1, 0, 1, 0]].astype(np.float32)
        kept = scores >= (0.0 if score is None else score)
        return Found(
            image_hw=image_hw,
            boxes=(boxes * factors)[kept],
            scores=scores[kept],
            labels=labels[kept],
            masks=masks[kept],
            mask_scores=own[0][kept] if own else None,
        )

    def padded(self, image: Picture) -> Picture:
        """An image (3, h, w) with zeros right and bottom, to the size of the input or the next that it takes."""
        divisor = self.about.divisor
        size = self.about.size or tuple(-(-side // divisor) * divisor for side in image.shape[1:])
        room = [(0, size[axis] - image.shape[1 + axis]) for axis in (0, 1)]
        return np.pad(image, ((0, 0), *room))

    def run(self, image: Picture, image_hw: tuple[int, int]) -> list[NDArray[Any]]:
        """Boxes, scores, labels, masks and, if there are any, mask scores of an image, in its pixels.

        Args:
            image: (3, H, W) uint8 RGB, padded.
            image_hw: height and width without the padding.
        """
        inputs = {"image": np.ascontiguousarray(image), "image_size": np.array(image_hw, np.int64)}
        try:
            found: list[NDArray[Any]] = self._session.run(None, inputs)
        except Exception as error:  # onnxruntime raises many types
            raise UserError(f"{self.path}: cannot be run ({_first_line(error)}); export it again") from None
        if len(found[2]) and not 0 <= found[2].min() <= found[2].max() < len(self.about.classes):
            raise UserError(f"{self.path}: finds classes that it does not name; export it again")
        return found


load = OnnxModel


def _session(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: running it needs onnxruntime; pip install 'tailseg[export]'") from None
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give the path of a model that `tailseg export` wrote")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: is larger than an ONNX file can be; export it again")
    content = path.read_bytes()
    try:
        elsewhere = ELSEWHERE in content or has_weights_elsewhere(content)
    except ValueError as error:
        raise UserError(f"{path}: is no ONNX file that onnxruntime can run ({error}); export it again") from None
    if elsewhere:
        raise UserError(f"{path}: keeps weights in other files, which tailseg's never do; export it again")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.load_model_format", "ONNX")  # not its own, which was not looked through
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [])
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types
        raise UserError(
            f"{path}: is no ONNX file that onnxruntime can run ({_first_line(error)}); export it again"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][-120:]

"""Rows of detections on CUDA, written behind the loop: the same file, while the device computes something else."""

import pytest
import torch

from tailseg.evaluation.behind import behind
from tailseg.evaluation.results import ResultsWriter
from tailseg.structures import RawDetections

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def detections(seed: int) -> RawDetections:
    """Forty objects, made on the device by what is still in its queue when they are handed on."""
    generator = torch.Generator("cuda").manual_seed(seed)
    corners = torch.rand(40, 2, generator=generator, device="cuda") * 500
    sides = torch.rand(40, 2, generator=generator, device="cuda") * 100 + 1
    return RawDetections(
        image_hw=(480, 640),
        boxes=torch.cat([corners, corners + sides], dim=1),
        scores=torch.rand(40, generator=generator, device="cuda"),
        labels=torch.randint(7, (40,), generator=generator, device="cuda"),
        masks=torch.rand(40, 28, 28, generator=generator, device="cuda"),
    )


def test_the_file_is_the_same(tmp_path):
    ids = list(range(1, 8))
    with ResultsWriter(tmp_path / "plain.json") as writer:
        for image_id in range(30):
            writer.add(image_id, detections(image_id), ids)
    busy = torch.randn(2048, 2048, device="cuda")
    with (
        ResultsWriter(tmp_path / "behind.json") as writer,
        behind(writer.add, torch.device("cuda", torch.cuda.current_device())) as later,
    ):
        for image_id in range(30):
            busy = busy @ busy / busy.norm()
            later(image_id, detections(image_id), ids)
    assert (tmp_path / "plain.json").read_bytes() == (tmp_path / "behind.json").read_bytes()

"""CUDA graphs of training steps: losses, gradients and counts of replays are those of steps as ever."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import noise_batch
from torch import Tensor

from tailseg.model.build import build_detector
from tailseg.model.detector import Detector
from tailseg.recipes.resolve import resolve
from tailseg.structures import Batch
from tailseg.training.graphs import CudaGraph, GraphedStep, Outcome

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("full_float32"),
]

GPU = torch.device("cuda")
CLASSES = 37
SMALL = (
    "model.backbone.name=resnet18",
    "model.neck.channels=32",
    "model.box_head={width: 64, rois: 64}",
    "model.rpn.post_nms_train=200",
    "model.mask_head.channels=32",
    "model.tsd.shift_width=32",
    "model.mask_iou={channels: 32, width: 64}",
)


def detector(name: str) -> Detector:
    torch.manual_seed(0)
    model = build_detector(resolve(name, list(SMALL)), CLASSES)
    return model.to(GPU, memory_format=torch.channels_last).train()


def batches() -> list[Batch]:
    """Of two shapes: the first, again, recorded, replayed, then the other twice, and the first again."""

    def one(seed: int) -> Batch:
        return noise_batch((192, 224), (184, 208), objects=5, num_classes=CLASSES, seed=seed, sides=(16, 62))

    def other(seed: int) -> Batch:
        return noise_batch((224, 192), (200, 190), objects=3, num_classes=CLASSES, seed=seed, sides=(16, 62))

    return [one(0), one(1), one(2), one(3), other(4), other(5), one(6), other(7)]


def work_of(model: Detector, *, bf16: bool) -> Callable[[Batch], Outcome]:
    def work(batch: Batch) -> Outcome:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            losses = model(batch)
        torch.stack(list(losses.values())).sum().backward()
        return {name: loss.detach() for name, loss in losses.items()}, {}

    return work


def new_graphs() -> Callable[[], CudaGraph]:
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["table1/seesaw", "table2/06-mask-scoring", "table2/10-seesaw"])
def test_replayed_steps_equal_steps_as_ever(name, bf16):
    """Sums by atomics differ in their last digits; random numbers and counts do not."""
    model = detector(name)
    twin = copy.deepcopy(model)
    step = GraphedStep(work_of(model, bf16=bf16), GPU, new_graphs())
    plain = GraphedStep(work_of(twin, bf16=bf16), GPU, None)
    for number, batch in enumerate(batches()):
        torch.manual_seed(number)
        expected, _ = plain(batch)
        after = torch.rand(3, device=GPU)
        torch.manual_seed(number)
        found, _ = step(batch)
        assert torch.equal(torch.rand(3, device=GPU), after)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].item() == pytest.approx(value.item(), rel=2e-2 if bf16 else 1e-3, abs=1e-4), (number, key)
        gradients = dict(model.named_parameters())
        for key, parameter in twin.named_parameters():
            own = gradients[key].grad
            if parameter.grad is None:
                assert own is None or own.count_nonzero() == 0
            else:
                bound = 0.2 if bf16 else 0.02
                assert (own - parameter.grad).norm() <= bound * parameter.grad.norm() + 1e-4, (number, key)
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[k], b) for k, b in twin.named_buffers() if b.dtype == torch.int64)
        model.zero_grad(set_to_none=False)
        twin.zero_grad()
    assert len(step.recorded) == 2


def test_replays_draw_by_the_seed_and_wait_for_nothing():
    model = detector("table1/seesaw")
    step, batch = GraphedStep(work_of(model, bf16=False), GPU, new_graphs()), batches()[0].pin_memory()

    def losses(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=False)
        return torch.stack(list(step(batch)[0].values()))

    for seed in range(3):
        losses(seed)
    assert step.recorded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one, other, again = losses(5), losses(6), losses(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(one, other)
    # Seesaw's counts have grown in between.
    torch.testing.assert_close(one[:2], again[:2], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_recorded_leaves_training_as_it_was(caplog):
    """A refused recording (here a number asked for, which the look beforehand is kept from seeing)."""
    weight = torch.ones((), device=GPU, requires_grad=True)

    def work(batch: Batch) -> Outcome:
        loss = weight * torch.rand((), device=GPU)
        if step.watched:
            loss.item()
        loss.backward()
        return {"loss": loss.detach()}, {}

    step = GraphedStep(work, GPU, new_graphs())
    found, expected = [], []
    for number in range(4):
        torch.manual_seed(number)
        found.append(step(batches()[0])[0]["loss"].item())
    for number in range(4):
        torch.manual_seed(number)
        expected.append(torch.rand((), device=GPU).item())
    assert found == expected
    assert not step.keeps_gradients
    assert "CUDA graphs: none from here on" in caplog.text
    torch.empty(1 << 28, dtype=torch.uint8, device=GPU)  # free again at once, and kept by the allocator
    reserved = torch.cuda.memory_reserved(GPU)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(GPU) <= reserved - (1 << 28)

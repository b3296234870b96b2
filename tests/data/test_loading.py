import json
import multiprocessing
import os
import signal
import time
from dataclasses import fields
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tailseg.data.annotations.annotations import load_annotations
from tailseg.data.dataset import DetectionDataset
from tailseg.data.loading import LoaderKilledError, eval_loader, plan_loader, train_loader
from tailseg.data.sampling import ClassAware, RepeatFactors, TrainSampler
from tailseg.data.transforms import Compose, HorizontalFlip, ResizeShortestEdge, fit_transform
from tailseg.errors import UserError

TRAIN = Compose((ResizeShortestEdge((32, 48), 90), HorizontalFlip(0.5)))


@pytest.fixture
def dataset(tmp_path):
    """Eleven small images of both orientations, with one object each."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(11):
        height, width = (40, 64) if i % 3 else (64, 40)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": i, "height": height, "width": width, "file_name": f"{i}.png"})
        shape = {"bbox": [4, 4, 20, 20], "area": 400, "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}
        annotations.append({"id": i, "image_id": i, "category_id": 1, **shape})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    annotations = load_annotations(tmp_path / "train.json", tmp_path / "images")
    return DetectionDataset(annotations, TRAIN, drop_empty=True, mask_grid=16)


def assert_same(one, other):
    for field in fields(one):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_training_batches_do_not_depend_on_workers_and_go_on_exactly(dataset):
    sampler = TrainSampler(dataset.aspect_groups, 2, seed=4)
    plain = list(islice(train_loader(dataset, sampler), 8))
    parallel = list(islice(train_loader(dataset, sampler, workers=2), 8))
    resumed = list(islice(train_loader(dataset, sampler, start_step=5), 3))
    for one, other in zip(plain, parallel, strict=True):
        assert_same(one, other)
    for one, other in zip(plain[5:], resumed, strict=True):
        assert_same(one, other)
    seen = torch.cat([batch.image_ids for batch in plain[: sampler.steps_per_epoch]])
    assert sorted(set(seen.tolist())) == list(range(11))


@pytest.mark.parametrize("kind", ["ceil", "stochastic", "class-aware"])
def test_every_sampler_is_the_same_for_any_number_of_workers(dataset, kind):
    draw = ClassAware(np.arange(11), np.arange(11) % 3, 11)
    if kind != "class-aware":
        draw = RepeatFactors(1 + np.arange(11) / 5, kind)
    sampler = TrainSampler(dataset.aspect_groups, 2, seed=4, draw=draw)
    count = sampler.steps_per_epoch + 3
    plain = list(islice(train_loader(dataset, sampler), count))
    parallel = list(islice(train_loader(dataset, sampler, start_step=2, workers=2), count - 2))
    for one, other in zip(plain[2:], parallel, strict=True):
        assert_same(one, other)


def test_loaders_leave_the_global_generator_alone(dataset):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(train_loader(dataset, TrainSampler(dataset.aspect_groups, 2))))
    list(eval_loader(dataset))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world", "batch_size", "workers"), [(1, 4, 0), (3, 2, 0), (2, 3, 1), (12, 1, 0)])
def test_evaluation_sees_every_image_once_among_those_of_its_size(dataset, world, batch_size, workers):
    dataset = DetectionDataset(dataset.annotations, fit_transform(30, 90), drop_empty=False)
    seen = []
    for rank in range(world):
        loader = eval_loader(dataset, batch_size, rank, world, workers)
        batches = list(loader)
        assert len(loader) == len(batches)
        for batch in batches:
            height, width = (-(-side // 32) * 32 for side in batch.image_sizes[0].tolist())
            assert batch.images.shape == (len(batch), 3, height, width)  # no image is padded for another's sake
            ids = batch.image_ids.tolist()
            assert ids == sorted(ids)
            assert {image % 3 == 0 for image in ids} == {ids[0] % 3 == 0}  # every third stands upright
            seen += ids
        if rank == 0 and world == 1:
            assert [len(batch) for batch in batches] == [4, 4, 3]
    assert sorted(seen) == list(range(11))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_arrives_as_one_sentence(dataset, workers):
    path = dataset.annotations.images_dir / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        list(eval_loader(dataset, 2, workers=workers))
    assert str(caught.value).startswith(f"{path}: the image is broken or cut off")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_absent_classes_stay_with_their_images(dataset, workers):
    path = dataset.annotations.path
    content = json.loads(path.read_text())
    content["categories"] += [{"id": i, "name": f"class{i}"} for i in range(2, 13)]
    for image in content["images"]:
        image["neg_category_ids"] = [image["id"] + 2]
    path.write_text(json.dumps(content))
    dataset = DetectionDataset(load_annotations(path, path.parent / "images"), TRAIN, drop_empty=True, mask_grid=16)
    seen = []
    for batch in islice(train_loader(dataset, TrainSampler(dataset.aspect_groups, 2), workers=workers), 6):
        assert batch.absent.dtype == torch.bool
        # Category i has label i - 1, so image i lacks label i + 1.
        assert batch.absent.nonzero().tolist() == [[row, i + 1] for row, i in enumerate(batch.image_ids.tolist())]
        seen += batch.image_ids.tolist()
    assert set(seen) == set(range(11))


class Slow(Dataset[Tensor]):
    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        time.sleep(0.002)
        return torch.zeros(100)


@pytest.mark.parametrize("pause", [0.0, 0.05])
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_worker_is_told_by_its_own_loader_alone(killed: int, pause: float) -> None:
    """Never outside of waiting for a batch, and not by the next loader, though the error is still held."""
    plan = [[(i, 0), (i, 1)] for i in range(100)]

    def kill_some() -> None:
        for number, _ in enumerate(plan_loader(Slow(), plan, torch.stack, workers=2)):
            if number == 5:
                for child in multiprocessing.active_children()[:killed]:
                    os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
                time.sleep(pause)  # the signal comes here, or while the next batch is waited for
                told.append("alive")

    for _ in range(3):
        told: list[str] = []
        with pytest.raises(LoaderKilledError, match=r"^a loader process was killed, .* lower data\.workers") as held:
            kill_some()
        assert told == ["alive"]
        assert sum(1 for _ in plan_loader(Slow(), plan[:4], torch.stack, workers=1)) == 4
        assert held.value is not None

"""What ``auto`` becomes: the search for a batch against a machine of known memory, shapes of the worst case, runs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import SMALL_RECIPE, assert_refused, tailseg

from tailseg.data.batches import collate
from tailseg.data.dataset import train_dataset
from tailseg.data.loading import worker_count
from tailseg.data.sources import DataSplits, open_data
from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic
from tailseg.errors import UserError
from tailseg.model.build import build_detector
from tailseg.recipes.data_section import DataRecipe
from tailseg.recipes.resolve import resolve
from tailseg.training import automatic
from tailseg.training.automatic import full_batch, largest_batch, largest_hw, settled
from tailseg.training.class_statistics import class_statistics
from tailseg.training.loop import train

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    settings = SyntheticSettings(classes=4, train_images=12, val_images=4, size=64, rarest=3)
    return open_data(str(write_synthetic(tmp_path_factory.mktemp("set") / "data", settings)))


@given(fixed=st.integers(0, 50), each=st.integers(1, 30), most=st.integers(1, 64), bend=st.floats(0, 0.5))
def test_the_batch_is_the_largest_that_fits(fixed, each, most, bend):
    """Memory grows by ``each`` a picture, and a little faster in the end; three steps or few more find the batch."""
    asked = []

    def memory(number: int) -> int | None:
        asked.append(number)
        taken = int(fixed + each * number * (1 + bend * number / 64))
        return None if taken > 130 else taken  # more than there is

    sizes = [n for n in range(1, most + 1) if fixed + each * n * (1 + bend * n / 64) < 101]
    if not sizes:
        with pytest.raises(UserError, match=r"^mine: a training step with one image does not fit"):
            largest_batch(memory, most, 100, "mine")
        return
    found = largest_batch(memory, most, 100)
    assert found in sizes
    if bend == 0:
        assert found == sizes[-1]
    assert found >= 0.6 * sizes[-1]
    assert len(asked) <= 12


def test_the_search_says_what_to_do_if_one_image_is_too_large():
    with pytest.raises(UserError) as refused:
        largest_batch(lambda number: None, 16, int(0.85 * 2**30), "own/fast")
    assert "does not fit into the free memory of the GPU (1.0 GiB); lower data.short_edges" in str(refused.value)


def with_sizes(data: DataSplits, *sizes: tuple[int, int]):
    assert data.train is not None
    return replace(data.train, image_sizes=np.array(sizes))


def test_the_largest_shape_is_that_of_one_orientation(data):
    some = with_sizes(data, (480, 640), (640, 480), (300, 900), (1000, 1000))
    recipe = DataRecipe(short_edges=(400, 600), long_edge=1000)
    # Landscapes: 480 x 640 becomes 600 x 800, 300 x 900 333 x 1000, the square 600 x 600. Portraits: 800 x 600.
    assert largest_hw(some, recipe) == (600, 1000)
    assert largest_hw(with_sizes(data, (640, 480)), recipe) == (800, 600)
    assert largest_hw(some, DataRecipe(long_edges=(100, 1500), crop=512)) == (512, 512)
    assert largest_hw(some, DataRecipe(long_edges=(100, 200))) == (200, 200)


def test_no_real_batch_is_larger_than_the_full_one(data):
    assert data.train is not None
    recipe = resolve("demo/seesaw", ["data.long_edges=[40,90]", "data.mask_grid=28"]).data
    dataset = train_dataset(data.train, recipe)
    real = [collate([dataset[i, seed] for i in range(12)], 64) for seed in range(4)]
    objects = max(len(dataset[i].instances) for i in range(12))
    full = full_batch(12, largest_hw(data.train, recipe), 64, objects, 4, recipe)
    for batch in real:
        for name in ("images", "boxes", "masks", "absent"):
            assert all(a <= b for a, b in zip(getattr(batch, name).shape, getattr(full, name).shape, strict=True))
            assert getattr(batch, name).dtype == getattr(full, name).dtype


def test_a_detector_trains_on_the_full_batch(data):
    assert data.train is not None
    recipe = resolve("demo/seesaw", list(SMALL_RECIPE))
    detector = build_detector(recipe, 4, class_statistics(data.train)).train()
    batch = full_batch(2, largest_hw(data.train, recipe.data), detector.divisor, 5, 4, recipe.data)
    losses = detector(batch)
    assert all(value.isfinite() for value in losses.values())


def fabric(device: torch.device, world: int = 1):
    return SimpleNamespace(device=device, world_size=world, global_rank=0)


def test_on_a_cpu(data, tmp_path, caplog):
    asked = resolve("table1/seesaw", ["data.batch_per_device=auto", "training.precision=auto"])
    with caplog.at_level("INFO", logger="tailseg"):
        found = settled(asked, fabric(CPU), data, tmp_path, resume=False)
    assert (found.data.batch_per_device, found.training.precision) == (4, "fp32")
    assert "Batch: 4 images a process (data.batch_per_device=auto; at most 12," in caplog.text
    assert settled(asked, fabric(CPU, 8), data, tmp_path, resume=False).data.batch_per_device == 2  # 16 images in all
    fixed = resolve("table1/seesaw")
    assert settled(fixed, fabric(CPU), data, tmp_path, resume=False) is fixed


def test_on_a_gpu_of_known_memory(data, tmp_path, monkeypatch):
    """A GPU is made up: 100 bytes are free, a step takes 10 and 9 for each image."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(automatic.StepMemory, "__call__", lambda self, number: 10 + 9 * number)
    asked = resolve("table1/seesaw", ["data.batch_per_device=auto", "training.precision=auto"])
    found = settled(asked, fabric(GPU), data, tmp_path, resume=False)
    assert (found.data.batch_per_device, found.training.precision) == (8, "bf16")  # 82 of 85 bytes


def test_where_one_image_does_not_fit_all_processes_hear_of_it(data, tmp_path, monkeypatch):
    told = []

    def first_trouble(_fabric, own: str) -> str:
        told.append(own)
        return own or "the second process: no room"

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    monkeypatch.setattr(automatic, "first_trouble", first_trouble)
    asked = resolve("table1/seesaw", ["data.batch_per_device=auto"])
    for taken, message in ((None, "does not fit into the free memory"), (9, "the second process: no room")):
        monkeypatch.setattr(automatic.StepMemory, "__call__", lambda self, number, taken=taken: taken)
        with pytest.raises(UserError, match=message):
            settled(asked, fabric(GPU), data, tmp_path, resume=False)
    assert ["does not fit" in own for own in told] == [True, False]


@pytest.mark.parametrize("loss", ["seesaw", "eql-v2"])
def test_measuring_exchanges_nothing(data, monkeypatch, loss):
    """Processes measure a different number of steps, so counts that they summed would be those of others."""
    exchanged = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda counts, **_: exchanged.append(counts.shape))
    recipe = resolve("demo/cross-entropy", [*SMALL_RECIPE, f"classifier.loss={loss}"])
    automatic.StepMemory(recipe, data.train, CPU)._step(2)
    assert exchanged == []
    detector = build_detector(recipe, 4, class_statistics(data.train)).train()
    detector(full_batch(2, largest_hw(data.train, recipe.data), detector.divisor, 5, 4, recipe.data))
    assert exchanged  # as a step of the training does


def test_graphs_take_as_much_memory_beside_a_step(data, monkeypatch):
    """A GPU is made up on which a step takes 70 bytes."""
    for name, value in (("memory_allocated", 30), ("max_memory_allocated", 100)):
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(automatic.StepMemory, "_step", lambda self, number: None)
    recipe = resolve("demo/seesaw", list(SMALL_RECIPE))
    plain, with_graphs = (automatic.StepMemory(recipe, data.train, GPU, graphs=graphs) for graphs in (False, True))
    assert plain(2) == 70
    assert plain.objects < 32
    assert with_graphs(2) == 140
    assert with_graphs.objects == 32


def test_a_run_goes_on_with_what_it_began_with(data, tmp_path, monkeypatch):
    auto = ("data.batch_per_device=auto", "training.precision=auto", "data.workers=auto")
    recipe = resolve("demo/seesaw", [*SMALL_RECIPE, *auto, "schedule={epochs: 1, milestones: [], warmup_steps: 1}"])
    train(recipe, data, tmp_path / "run", show=False)
    stored = resolve(str(tmp_path / "run" / "recipe.yaml"))
    assert (stored.data.batch_per_device, stored.training.precision, stored.data.workers) == (4, "fp32", "auto")
    assert resolve(str(tmp_path / "run" / "last.safetensors")).data.batch_per_device == 4
    monkeypatch.setattr(automatic, "ON_A_CPU", 3)
    longer = resolve("demo/seesaw", [*SMALL_RECIPE, *auto, "schedule={epochs: 2, milestones: [], warmup_steps: 1}"])
    train(longer, data, tmp_path / "run", resume=True, show=False)
    assert resolve(str(tmp_path / "run" / "recipe.yaml")).data.batch_per_device == 4


def test_workers(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert worker_count(3, GPU) == 3
    assert worker_count("auto", CPU) == 2
    assert worker_count("auto", GPU) == 6
    assert worker_count("auto", GPU, processes=4) == 1
    assert worker_count("auto", GPU, processes=16) == 1
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(96)))
    assert worker_count("auto", GPU) == 8


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "data.batch_per_device=0",
            "data.batch_per_device: expected a whole number from 1 to 1024 or auto, received 0",
        ),
        ("data.batch_per_device=some", "expected a whole number from 1 to 1024 or auto, received 'some'"),
        ("data.workers=1.5", "data.workers: expected a whole number from 0 to 1024 or auto, received 1.5"),
        ("data.workers=true", "data.workers: expected a number, received True"),
        ("data.workers=.inf", "expected a whole number from 0 to 1024 or auto, received inf"),
        ("data.workers=.nan", "expected a whole number from 0 to 1024 or auto, received nan"),
        ("training.precision=fp8", "training.precision"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, setting, said):
    done = tailseg("recipes", "show", "table1/seesaw", "--set", setting)
    assert_refused(done, said)

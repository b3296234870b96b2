import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tailseg.checkpoint import (
    load_model,
    load_weights,
    read_tensors,
    save_model,
    write_tensors,
)
from tailseg.data.annotations.annotations import Category
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve
from tailseg.training.resumption import load_trainer, read_trainer, save_trainer

FIELDS = ("id", "name", "frequency", "image_count", "instance_count")
CATEGORIES = (Category(3, "zebra crossing", "r", 1, 2), Category(17, "café", "f", 200, 400))


def toy(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    # Channels last, as the detector: memory order and order of the axes differ.
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)


def test_model_round_trip(tmp_path: Path) -> None:
    path, model = tmp_path / "m.safetensors", toy()
    recipe = resolve("demo/seesaw", ["classifier.p=0.3"])
    metrics = {"segm": {"AP": 0.25, "APr": None}}
    save_model(path, model, recipe, CATEGORIES, step=7, metrics=metrics)
    found = load_model(path)
    assert (found.recipe, found.categories, found.step, found.metrics) == (recipe, CATEGORIES, 7, metrics)
    assert found.path == path
    state = model.state_dict()
    assert found.state.keys() == state.keys()
    assert all(
        torch.equal(found.state[key], state[key]) and found.state[key].dtype == state[key].dtype for key in state
    )
    save_model(path, state, recipe, (), step=0)
    assert (load_model(path).categories, load_model(path).metrics) == ((), None)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tensors_of_any_kind_round_trip(tmp_path: Path) -> None:
    tensors = {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "counts": torch.tensor([1, 2**40]),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "channels last": torch.rand(1, 3, 2, 2).to(memory_format=torch.channels_last),
        "half": torch.rand(3).to(torch.bfloat16),
    }
    write_tensors(tmp_path / "t", tensors, {"tailseg": "1", "list": [1, None, "é"]})
    found, about = read_tensors(tmp_path / "t")
    assert about == {"tailseg": "1", "list": [1, None, "é"]}
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    path = tmp_path / "m.safetensors"
    write_tensors(path, {"x": torch.ones(3)}, {"tailseg": "1"})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"{path}: could not be saved .{os.strerror(fault)}.*intact; make room$"):
        write_tensors(path, {"x": torch.zeros(3)}, {"tailseg": "1"})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone/m: could not be saved: its folder is not there; make it"):
        write_tensors(tmp_path / "gone" / "m", {}, {"tailseg": "1"})


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for content in (b"", b"\x00" * 100, b"noise" * 99, (2**62).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: is not a tailseg checkpoint"):
            read_tensors(path)
    torch.save({"x": torch.ones(1)}, path)
    with pytest.raises(UserError, match="is not a tailseg checkpoint"):
        load_model(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UserError, match="carries no recipe"):
        load_model(path)
    with pytest.raises(UserError, match=f"^{tmp_path / 'gone'}: there is no such file"):
        load_model(tmp_path / "gone")
    with pytest.raises(UserError, match=f"^{tmp_path}: this folder holds no best.safetensors or last.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"recipe": {"name": "x", "future": 1}, "categories": [], "step": 0, "metrics": None},
        {"recipe": {"name": "x"}, "categories": [{"id": 1}], "step": 0, "metrics": None},
        {"recipe": {"name": "x"}, "categories": [], "step": None, "metrics": None},
        {"recipe": {"name": "x"}, "categories": [], "step": 0, "metrics": []},
        {"recipe": {"name": "x"}, "categories": [], "step": 0},
        {"recipe": {"name": "x"}, "categories": {"a": 1}, "step": 0, "metrics": None},
        {"recipe": {"name": "x"}, "categories": [dict.fromkeys(FIELDS, 1)], "step": 0, "metrics": None},
        {"recipe": {"name": "x"}, "categories": [dict.fromkeys(FIELDS, "1")], "step": 0, "metrics": None},
    ],
)
def test_a_checkpoint_of_another_version(tmp_path: Path, about: dict[str, Any]) -> None:
    write_tensors(tmp_path / "m", {}, {"tailseg": "99.0", **about})
    with pytest.raises(
        UserError, match=r"m: its recipe or categories cannot be read \(.+\); it was written by tailseg 99\.0"
    ):
        load_model(tmp_path / "m")


CATEGORY = {"id": 1, "name": "owl", "frequency": "f", "image_count": 1, "instance_count": 1}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"id": 2**63}, "has a number of more than 64 bits"),
        ({"id": -(2**63) - 1}, "has a number of more than 64 bits"),
        ({"instance_count": 10**4000}, "has a number of more than 64 bits"),
        ({"frequency": "z"}, "has a frequency that is none of r, c and f"),
        ({"name": "o" * 100_001}, "has a name of more than 100,000 letters"),
        ({"name": "a\ud800"}, "has a name that is no text"),
        ({"id": True}, "is not made of id, name, frequency, image_count, instance_count"),
    ],
)
def test_categories_that_cannot_be(tmp_path: Path, value: dict[str, Any], fault: str) -> None:
    about = {"tailseg": "1.0", "recipe": {"name": "x"}, "step": 0, "metrics": None}
    largest = {"id": 2**63 - 1, "name": "o" * 1000}
    write_tensors(tmp_path / "m", {}, about | {"categories": [CATEGORY | largest]})
    assert load_model(tmp_path / "m").categories == (Category(**{**CATEGORY, **largest}),)
    write_tensors(tmp_path / "m", {}, about | {"categories": [CATEGORY, CATEGORY | value]})
    with pytest.raises(UserError, match=rf"m: its recipe or categories cannot be read \(category 1 {fault}\)"):
        load_model(tmp_path / "m")


def test_weights_must_fit_in_full(tmp_path: Path) -> None:
    model, path = toy(), tmp_path / "m"
    state = model.state_dict()
    other = {key: value + 1 for key, value in state.items()}
    load_weights(model, other, path)
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())
    missing = {key: value for key, value in state.items() if key != "0.bias"}
    for wrong, named in (
        (missing, "0.bias"),
        ({**state, "left.over": torch.ones(1)}, "left.over"),
        ({**state, "0.weight": torch.ones(4, 3, 2, 3)}, "0.weight"),
        ({}, "0.weight"),
    ):
        with pytest.raises(UserError, match=f"does not fit its recipe, first at '{named}'"):
            load_weights(model, wrong, path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """Such a model would find nothing, and not say why."""
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[1, 2] = value
    path = tmp_path / "m.safetensors"
    state = {"empty": torch.zeros(0, dtype=dtype), "count": torch.tensor(3), "w": torch.ones(2, dtype=dtype)}
    save_model(path, state, resolve("demo/seesaw"), (), step=0)
    assert load_model(path).state.keys() == state.keys()
    save_model(path, {**state, "box.weight": tensor}, resolve("demo/seesaw"), (), step=0)
    with pytest.raises(UserError, match=f"^{path}: 'box.weight' holds values that are not finite: the model had div"):
        load_model(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.complex64])
def test_weights_of_another_type(tmp_path: Path, dtype: torch.dtype) -> None:
    state = toy().state_dict()
    state["0.bias"] = state["0.bias"].to(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=f"m: '0.bias' is of type {kind}, but float32 was expected; give the file that"):
        load_weights(toy(), state, tmp_path / "m")


def test_every_change_of_a_file_is_found(tmp_path: Path) -> None:
    path, changed = tmp_path / "m.safetensors", tmp_path / "changed"
    save_model(path, toy(), resolve("demo/seesaw"), CATEGORIES, step=7)
    whole = path.read_bytes()
    known = load_model(path)
    start = int.from_bytes(whole[:8], "little") + 8
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(whole), (150,), generator=generator).tolist()
    places += torch.randint(start, len(whole), (50,), generator=generator).tolist()
    refused = kept = 0
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        changed.write_bytes(content)
        try:
            found = load_model(changed)
        except UserError as error:
            refused += str(error).startswith(f"{changed}: ")
        else:  # a byte that means nothing
            kept += 1
            assert found.recipe == known.recipe
            assert (found.categories, found.step) == (known.categories, known.step)
            assert all(torch.equal(value, known.state[key]) for key, value in found.state.items())
    assert refused + kept == 200
    assert refused >= 190
    for one, other in ((start, start + 8), (start, start + 64)):
        content = bytearray(whole)
        content[one : one + 8], content[other : other + 8] = content[other : other + 8], content[one : one + 8]
        changed.write_bytes(content)
        with pytest.raises(UserError, match=f"^{changed}: is not as it was written .its checksum differs."):
            load_model(changed)


def test_files_of_earlier_versions_have_no_checksum(tmp_path: Path) -> None:
    path, state = tmp_path / "m.safetensors", toy().state_dict()
    save_model(path, state, resolve("demo/seesaw"), CATEGORIES, step=7)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert len(json.loads(metadata.pop("checksum"))) == 64
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    assert load_model(path).step == 7


RUN = {"step": 0, "best": None, "seed": 0, "world_size": 1, "recipe": {}, "categories": []}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(72.0).reshape(2, 3, 3, 4).sin()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_trainer_round_trip(tmp_path: Path, kind: Any) -> None:
    """Steps after a restoration are the steps that would have followed, to the bit."""
    options = {"lr": 0.1, "fused": True, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    model, average = toy(), toy(1)
    optimizer = kind(model.parameters(), **options)
    save_trainer(tmp_path / "fresh", model, optimizer, None, RUN)  # no optimiser state yet
    for _ in range(3):
        step(model, optimizer)
    about = {**RUN, "step": 3, "recipe": {"a": {"b": [1]}}}
    save_trainer(tmp_path / "t", model, optimizer, average, about)
    twin, twin_average = toy(2), toy(3)
    twin_optimizer = kind(twin.parameters(), **options)
    tensors, found = read_trainer(tmp_path / "t")
    assert {key: found[key] for key in about} == about
    load_trainer(tmp_path / "t", tensors, twin, twin_optimizer, twin_average)
    for _ in range(2):
        step(model, optimizer)
        step(twin, twin_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), twin_average.parameters(), strict=True))
    tensors, found = read_trainer(tmp_path / "fresh")
    load_trainer(tmp_path / "fresh", tensors, twin, kind(twin.parameters(), **options), None)
    assert found["step"] == 0


@pytest.mark.parametrize("key", sorted(RUN))
def test_a_trainer_file_that_says_too_little(tmp_path: Path, key: str) -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for about in ({k: v for k, v in RUN.items() if k != key}, {**RUN, key: {"no": 1} if key != "recipe" else 1}):
        save_trainer(tmp_path / "t", model, optimizer, None, about)
        if key == "best" and key not in about:
            assert read_trainer(tmp_path / "t")  # None says the same
            continue
        with pytest.raises(UserError, match=rf"t: does not say with which {key} the run goes on: it is no trainer"):
            read_trainer(tmp_path / "t")


@pytest.mark.parametrize("name", ["optimizer.99.momentum_buffer", "optimizer.x", "optimizer.0.momentum_buffer"])
def test_a_trainer_file_with_the_optimiser_of_another_model(tmp_path: Path, name: str) -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    save_trainer(tmp_path / "t", model, optimizer, None, RUN)
    tensors, _ = read_trainer(tmp_path / "t")
    with pytest.raises(UserError, match=rf"t: '{name}' is of another model; the file was edited"):
        load_trainer(tmp_path / "t", {**tensors, name: torch.zeros(7)}, model, optimizer, None)

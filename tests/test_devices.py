"""Devices by name, on machines that these tests play."""

import pytest
import torch

from tailseg.devices import find_device
from tailseg.errors import UserError
from tailseg.training.distributed import launch


@pytest.fixture
def machine(monkeypatch):
    """A function: the machine has this many CUDA GPUs, and perhaps Apple's."""

    def made(gpus: int = 0, *, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return made


@pytest.mark.parametrize(
    ("device", "gpus", "found"),
    [
        (None, 0, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 2, "cpu"),
        ("cpu:0", 0, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
        (0, 1, "cuda:0"),
        (1, 2, "cuda:1"),
        (torch.device("cuda", 1), 2, "cuda:1"),
        (torch.device("meta"), 0, "meta"),
    ],
)
def test_devices_that_are_there(machine, device, gpus, found):
    machine(gpus)
    assert find_device(device) == torch.device(found)


def test_apples_gpu_is_taken_where_it_is_asked_for(machine):
    machine(mps=True)
    assert find_device("mps") == find_device("mps:0") == torch.device("mps")
    assert find_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "gpus", "sentence"),
    [
        ("cuda", 0, "device 'cuda': PyTorch finds no CUDA GPU on this machine; choose cpu, or leave it at auto"),
        (0, 0, "device 'cuda:0': PyTorch finds no CUDA GPU on this machine; choose cpu, or leave it at auto"),
        ("cuda:1", 1, "device 'cuda:1': this machine has one GPU, cuda:0; choose one of these, or leave it at auto"),
        (4, 4, "device 'cuda:4': this machine has 4 GPUs, cuda:0 to cuda:3; choose one of these, or leave it at auto"),
        ("mps", 0, "device 'mps': PyTorch finds no Apple GPU on this machine; choose cpu, or leave it at auto"),
        ("cpu:3", 0, "device 'cpu:3': this machine has one 'cpu' device only; choose cpu"),
    ],
)
def test_devices_that_are_not_there(machine, device, gpus, sentence):
    machine(gpus)
    with pytest.raises(UserError) as caught:
        find_device(device)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("device", "meant"),
    [("gpu", "cuda"), ("GPU:1", "cuda:1"), ("CPU", "cpu"), ("0", "cuda:0"), ("cuda:x", "cuda"), ("coda", "cuda"),
     ("mpps", "mps"), (-1, "cuda"), ("cuda:", "cuda")],
)  # fmt: skip
def test_names_of_no_device(device, meant):
    with pytest.raises(UserError, match=rf"there is no such device; did you mean '{meant}'\? Choose from auto, cpu"):
        find_device(device)


def test_a_run_on_a_device(machine):
    assert launch(1, "cpu").device == torch.device("cpu")
    machine(2)
    with pytest.raises(UserError, match=r"^device 'cuda:1': is one device for several processes; choose cpu or cuda"):
        launch(2, "cuda:1")
    with pytest.raises(UserError, match=r"^--devices 3: this machine has 2 GPU"):
        launch(3)
    machine(mps=True)
    with pytest.raises(UserError, match=r"^device 'mps': is one device for several processes"):
        launch(2, "mps")

"""The processes of a run: how they start, what they agree on, and whose batch statistics are learnt."""

from __future__ import annotations

import logging
import os
import warnings

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tailseg.devices import find_device
from tailseg.errors import UserError
from tailseg.layers.norm import count_learning, synchronize
from tailseg.training.local_ranks import start_ranks, starting


class _OneStream(DDPStrategy):  # type: ignore[misc]
    """Gradients of all processes averaged, with hooks on the stream that the model runs on.

    Fabric's own makes the hooks on another stream, which then waits for each gradient.
    """

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        """Wrap a model. Counts and batch statistics are those of all processes: no buffer needs broadcasting."""
        devices = None if self.root_device.type == "cpu" else [self.root_device]
        return DistributedDataParallel(
            module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def launch(devices: int, device: str | int | torch.device | None = None) -> Fabric:
    """Start the processes of a run: ``devices`` on this machine, or those of torchrun or SLURM.

    Args:
        devices: number of them.
        device: where they run (see `find_device`); one that has a number takes a single process.

    Raises:
        UserError: there is no such device, or not that many.
    """
    chosen = find_device(device)
    nodes = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif "SLURM_NNODES" in os.environ and "SLURM_NTASKS" in os.environ:
        nodes = int(os.environ["SLURM_NNODES"])
    if chosen.type == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPU(s); ask for no more")
    many, numbered = devices * nodes > 1, ":" in str(chosen)
    if many and (numbered or chosen.type == "mps"):
        raise UserError(
            f"device '{chosen}': is one device for several processes; choose cpu or cuda (CUDA_VISIBLE_DEVICES chooses "
            "among GPUs), or a single process"
        )
    # Newer releases of PyTorch rename that argument, and remark on the strides of channels_last gradients.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    strategy = _OneStream() if many else "auto"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # importing it sets another level
    fabric = Fabric(
        accelerator=chosen.type,
        devices=[chosen.index] if numbered else devices,
        num_nodes=nodes,
        strategy=strategy,
    )
    if isinstance(fabric.strategy, DDPStrategy):
        environment = fabric.strategy.cluster_environment
        assert environment is not None
        start_ranks(environment, devices)
    with starting():
        fabric.launch()
    return fabric


def batch_norm_note(model: nn.Module, world_size: int) -> str:
    """Make batch statistics those of all processes; says whose they are, or nothing where none are learnt."""
    learning = count_learning(model)
    if learning == 0:
        return ""
    if world_size == 1:
        return f"Batch norm: {learning} layers learn their statistics, from this process alone (SyncBN needs several)."
    synchronize(model)
    return f"Batch norm: {learning} layers learn their statistics from all {world_size} processes (SyncBN)."


def worst(fabric: Fabric, state: int) -> int:
    """The largest of a number over all processes; waits for all."""
    if fabric.world_size == 1:
        return state
    return int(fabric.all_reduce(torch.tensor(float(state), device=fabric.device), reduce_op="max"))


def summed(fabric: Fabric, values: dict[str, float]) -> dict[str, float]:
    """Sums of named numbers over all processes, of which some may lack names; waits for all."""
    if fabric.world_size == 1:
        return values
    each: list[dict[str, float] | None] = [None] * fabric.world_size
    torch.distributed.all_gather_object(each, values)
    sums: dict[str, float] = {}
    for own in each:
        for name, value in (own or {}).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def first_trouble(fabric: Fabric, trouble: str) -> str:
    """What is wrong in the first process in which something is (empty where nothing is); waits for all."""
    if not worst(fabric, bool(trouble)):
        return ""
    if fabric.world_size == 1:
        return trouble
    troubles: list[str | None] = [None] * fabric.world_size
    torch.distributed.all_gather_object(troubles, trouble)
    return next(text for text in troubles if text)

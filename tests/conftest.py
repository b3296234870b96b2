"""Fixtures that many test files use."""

import os

# Before torch is loaded. One thread: the tests measure nothing, run two at a time, and some compare bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import hypothesis
import pytest
import torch
from hypothesis.internal.conjecture import providers

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is loaded: kernels then run on the CPU

from safetensors.torch import load_file

cv2.setNumThreads(0)  # as in loader workers

# Few examples, the same each time; HYPOTHESIS_PROFILE=thorough looks further.
hypothesis.settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=300, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
# Among its examples are constants of the project's modules that happen to be loaded, which is chance where tests are
# shared out among processes.
providers.is_local_module_file = lambda path: False  # type: ignore[attr-defined]

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test data and recordings that lies beside the project."""
    if not SHARED.is_dir():
        message = f"no test data at {SHARED}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return SHARED


Case = tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def recorded(shared: Path) -> Any:
    """A function: name of a recording -> its cases as (about, inputs, state, outputs)."""

    def cases(name: str) -> Iterator[Case]:
        about = json.loads((shared / "reference" / f"{name}.json").read_text())
        tensors = load_file(shared / "reference" / f"{name}.safetensors")
        for case in about["cases"]:
            inputs, state, outputs = (
                {key: tensors[stored] for key, stored in case.get(part, {}).items()}
                for part in ("inputs", "state", "outputs")
            )
            yield case, inputs, state, outputs

    return cases


@pytest.fixture(scope="session")
def check() -> Any:
    """A function: assert that an output meets its recorded tolerance."""

    def compare(case: dict[str, Any], name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        tolerance = case["tolerance"][name]
        assert ours.shape == theirs.shape, f"{case['name']}.{name}: {ours.shape} against {theirs.shape}"
        ours, theirs = ours.detach().double(), theirs.double()
        wrong = (ours - theirs).abs() > tolerance["atol"] + tolerance["rtol"] * theirs.abs()
        share = wrong.double().mean().item() if wrong.numel() else 0.0
        worst = (ours - theirs).abs().max().item() if wrong.numel() else 0.0
        assert share <= tolerance.get("may_differ", 0.0), (
            f"{case['name']}.{name}: {share:.2%} of values are off, by up to {worst:g}"
        )

    return compare

"""What Seesaw Loss costs over cross-entropy: time and memory of forward and backward on the same logits.

    python benchmarks/losses.py                       # CPU, two threads, two minutes
    python benchmarks/losses.py --device cuda

Ours is `tailseg.SeesawLoss` in training mode, counting included. Also timed: Seesaw Loss as a textbook would have it,
with a C x C matrix and loops over labels; and every classification of `tailseg.losses`, for information.

Cases take turns, and a turn repeats a case until it takes about 10 ms; a time ratio is the median of the ratios within
the turns, its spread their quartiles; the ratio of processor times beside it hardly minds that others use the machine.
Memory is the most that a call holds at once beyond what was there before it
(inputs and counts), the gradient that it returns included: on CUDA by torch.cuda.max_memory_allocated, on CPU by
torch.profiler, which records every allocation and release.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Waiting threads spin, as by PyTorch's own default, which a user of the loss alone has. Where they sleep
# (OMP_WAIT_POLICY=PASSIVE, as our command line sets it), every pass over a small batch waits for them to wake.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")

import harness
import torch
from gpu import in_error_mode
from torch import Tensor
from torch.nn import functional as F

from tailseg.losses import CLASSIFICATIONS, ClassStatistics, SeesawLoss

SIZES = ((256, 1203), (1024, 1203), (256, 8142))  # samples and classes: LVIS, LVIS, iNaturalist 2018
TEXTBOOK_SIZE = (256, 1203)
ALL_SIZE = (1024, 1203)
TURN = 0.01  # seconds that a turn of a case takes at least, about
TARGETS = {
    "cpu": {"time": 1.3, "memory": 1.1, "textbook": 15.0},
    "cuda": {"time": 1.2, "memory": 1.1, "textbook": 15.0},
}

Step = Callable[[], Tensor]  # forward and backward; returns the loss


def textbook_seesaw(logits: Tensor, labels: Tensor, counts: Tensor, p: float) -> Tensor:
    """Seesaw Loss read off Eqs. 1 and 2: mean over samples (N, C); adds the batch to ``counts`` (C,) float32."""
    classes = logits.shape[1]
    for label in labels.unique():
        counts[label] += (labels == label).sum()
    seen = counts.clamp(min=1)
    ratios = seen.unsqueeze(0) / seen.unsqueeze(1)  # (C, C), N_j / N_i
    factors = torch.where(ratios < 1, ratios**p, torch.ones_like(ratios)).to(logits.dtype)
    weights = torch.ones_like(logits)
    for label in labels.unique():
        weights[labels == label] = factors[label]
    own = F.one_hot(labels, classes)
    exponentials = (logits - logits.max(dim=1, keepdim=True).values.detach()).exp()
    shares = (exponentials * own).sum(1) / (exponentials * (weights * (1 - own) + own)).sum(1)
    return -shares.log().mean()


def inputs(samples: int, outputs: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits (N, outputs) that carry a gradient, and long-tailed labels (N,): class j in proportion to 1 / (j + 1)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, outputs, generator=generator) * 2
    frequency = 1 / torch.arange(1, classes + 1)
    labels = frequency.multinomial(samples, replacement=True, generator=generator)
    return logits.to(device).requires_grad_(), labels.to(device)


def step_of(name: str, size: tuple[int, int], device: torch.device) -> Step:
    """Cross-entropy, ours or the textbook's, ready to be called."""
    samples, classes = size
    logits, labels = inputs(samples, classes, classes, device)
    ours = SeesawLoss(classes).to(device).train()
    counts = torch.zeros(classes, device=device)
    forward: dict[str, Step] = {
        "cross-entropy": lambda: F.cross_entropy(logits, labels),
        "seesaw": lambda: ours(logits, labels),
        "textbook": lambda: textbook_seesaw(logits, labels, counts, ours.p),
    }
    return with_backward(forward[name], logits)


def classification_step(name: str, size: tuple[int, int], device: torch.device) -> Step:
    """A classification of `tailseg.losses`, ready to be called; it has the number of logits that it needs."""
    samples, classes = size
    kind = CLASSIFICATIONS[name]
    images = (2000 / torch.arange(1, classes + 1)).ceil().long()
    known = {"statistics": ClassStatistics(num_images=100_000, images=images, instances=images)}
    classification = kind(classes, **(known if kind.needs_statistics else {})).to(device).train()
    logits, labels = inputs(samples, classification.num_logits, classes, device)
    valid = torch.ones_like(labels, dtype=torch.bool)
    return with_backward(lambda: torch.stack(list(classification.loss(logits, labels, valid).values())).sum(), logits)


def with_backward(forward: Step, logits: Tensor) -> Step:
    def step() -> Tensor:
        loss = forward()
        torch.autograd.grad(loss, logits)  # as backward() does, but nothing is left behind for the next call
        return loss.detach()

    return step


def repetitions(step: Step, device: torch.device) -> int:
    """Calls that fill a turn."""
    step()  # the first call loads kernels
    once = min(harness.timed(step, device).clock for _ in range(3))
    return max(1, round(TURN / once))


def compare(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of one call of each case, and their ratios to the first."""
    number = {name: repetitions(step, device) for name, step in steps.items()}
    turns = {name: repeated(step, number[name]) for name, step in steps.items()}
    times = harness.in_turn(turns, repeats, device)
    seconds = {name: [t.clock / number[name] for t in own] for name, own in times.items()}
    processor = {name: [t.processor / number[name] for t in own] for name, own in times.items()}
    held = {name: held_memory(step, device) for name, step in steps.items()}
    first = next(iter(steps))
    return {
        name: {
            "seconds": spread(seconds[name]),
            "calls_a_turn": number[name],
            "time_ratio": spread([a / b for a, b in zip(seconds[name], seconds[first], strict=True)]),
            "processor_ratio": spread([a / b for a, b in zip(processor[name], processor[first], strict=True)]),
            "bytes": held[name],
            "memory_ratio": held[name] / held[first],
        }
        for name in steps
    }


def repeated(step: Step, number: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(number):
            step()

    return turn


def spread(values: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"min": min(values), "lower": lower, "median": median, "upper": upper, "max": max(values)}


def held_memory(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call holds at once beyond what was there before it."""
    step()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        return harness.peak_memory(step, device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    changes: list[int] = [
        event["args"]["Bytes"] for event in sorted(events, key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    ]
    return max(itertools.accumulate(changes))


def same_as_textbook(size: tuple[int, int], device: torch.device) -> float:
    """Largest difference between ours and the textbook's losses of three steps, the counts growing.

    Raises:
        AssertionError: it is more than 1e-5 of the loss.
    """
    ours, textbook = step_of("seesaw", size, device), step_of("textbook", size, device)
    pairs = [(float(ours()), float(textbook())) for _ in range(3)]
    for a, b in pairs:
        assert abs(a - b) <= 1e-5 * max(abs(b), 1.0), f"ours {a}, textbook {b}"
    return max(abs(a - b) for a, b in pairs)


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    heads = f"{'ms/call':>9}{'time ratio (quartiles)':>28}{'processor':>11}{'MiB':>9}{'memory ratio':>15}"
    print(f"\n{title}\n  {'':20}{heads}")
    for name, row in rows.items():
        ratio = row["time_ratio"]
        print(
            f"  {name:20}{row['seconds']['median'] * 1e3:9.3f}"
            f"{ratio['median']:12.3f} ({ratio['lower']:.3f}-{ratio['upper']:.3f})"
            f"{row['processor_ratio']['median']:11.3f}"
            f"{row['bytes'] / 2**20:9.2f}{row['memory_ratio']:15.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=50, help="turns of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/losses-DEVICE.json")
    options = parser.parse_args()
    device = harness.require_device(options.device)
    torch.set_num_threads(options.threads)
    targets = TARGETS[options.device]
    result: dict[str, Any] = {
        "machine": harness.machine(device) | {"omp_wait_policy": os.environ["OMP_WAIT_POLICY"]},
        "repeats": options.repeats,
        "targets": targets,
    }

    result["sizes"] = {}
    for size in SIZES:
        steps = {name: step_of(name, size, device) for name in ("cross-entropy", "seesaw")}
        rows = result["sizes"]["{}x{}".format(*size)] = compare(steps, options.repeats, device)
        show("{} samples, {} classes: ratios to cross-entropy".format(*size), rows)
        print(f"  targets: time <= {targets['time']}, memory <= {targets['memory']}")

    difference = same_as_textbook(TEXTBOOK_SIZE, device)
    steps = {name: step_of(name, TEXTBOOK_SIZE, device) for name in ("seesaw", "textbook")}
    rows = compare(steps, max(3, options.repeats // 5), device)
    result["textbook"] = {"size": list(TEXTBOOK_SIZE), "largest_difference": difference, **rows}
    show("{} samples, {} classes: ratios to ours".format(*TEXTBOOK_SIZE), rows)
    print(f"  target: time >= {targets['textbook']}")

    steps = {"cross-entropy by torch": step_of("cross-entropy", ALL_SIZE, device)}
    steps |= {name: classification_step(name, ALL_SIZE, device) for name in CLASSIFICATIONS}
    result["classifications"] = compare(steps, max(3, options.repeats // 5), device)
    show(
        "{} samples, {} classes: ratios to cross-entropy, for information".format(*ALL_SIZE), result["classifications"]
    )

    if device.type == "cuda":
        step = step_of("seesaw", TEXTBOOK_SIZE, device)
        step()
        torch.cuda.synchronize()
        result["waits"] = in_error_mode(step)
        print(f"\nunder torch.cuda.set_sync_debug_mode('error'): {result['waits']}")
    harness.write_json(options.out or harness.RESULTS / f"losses-{options.device}.json", result)


if __name__ == "__main__":
    main()

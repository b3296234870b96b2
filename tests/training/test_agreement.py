"""Work that fails in one of two processes, at each of the places where it can, ends for both alike."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning_fabric import Fabric
from tiny import run_together

from tailseg.errors import UserError
from tailseg.training.agreement import attempt

# (which process fails, before or after it has met the other): what each is told.
PLACES = {"none": (None, None), "0 before": (0, 0), "1 before": (1, 0), "0 after": (0, 1), "1 after": (1, 1)}


def outcomes(fabric: Fabric) -> dict[str, tuple[str | None, str]]:
    found = {}
    for name, (rank, place) in PLACES.items():

        def job(meet: Callable[[], None], rank: int | None = rank, place: int | None = place) -> str:
            for now in range(2):
                if (rank, place) == (fabric.global_rank, now):
                    raise MemoryError("planted")
                if now == 0:
                    meet()
            return "done"

        found[name] = attempt(fabric, job)
        fabric.barrier()
    return found


def test_two_processes_agree(tmp_path: Path) -> None:
    assert run_together(__file__, (tmp_path,), (tmp_path,), linked=True) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    planted = "MemoryError: planted"
    assert first == {
        "none": ["done", ""],
        "0 before": [None, planted],
        "1 before": [None, planted],
        "0 after": [None, planted],
        "1 after": [None, planted],
    }
    assert second == {
        "none": ["done", ""],
        "0 before": [None, planted],
        "1 before": [None, planted],
        "0 after": [None, planted],
        "1 after": [None, planted],
    }


def test_one_process() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)

    def refuses(_meet: Callable[[], None]) -> None:
        raise UserError("a.jpg: is broken")

    def interrupted(_meet: Callable[[], None]) -> None:
        raise KeyboardInterrupt

    assert attempt(fabric, lambda meet: meet()) == (None, "")
    assert attempt(fabric, lambda _: 3) == (3, "")
    assert attempt(fabric, refuses) == (None, "a.jpg: is broken")
    with pytest.raises(KeyboardInterrupt):
        attempt(fabric, interrupted)


if __name__ == "__main__":
    from tailseg.training.distributed import launch

    fabric = launch(2)
    Path(sys.argv[1], f"{fabric.global_rank}.json").write_text(json.dumps(outcomes(fabric)))

"""Every kernel of the package is compiled by a test; what a launcher keeps follows from how arguments look."""

import re
from pathlib import Path

import pytest
import torch

from tailseg.layers.triton_support import Launcher

TESTS = Path(__file__).parent.parent
SOURCES = sorted((TESTS.parent / "src").rglob("*_triton.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_is_compiled_by_a_test(source):
    scripts = "\n".join(path.read_text() for path in TESTS.rglob("compile_*.py"))
    kernels = re.findall(r"def (_\w+)_kernel\(", source.read_text())
    assert kernels
    for kernel in kernels:
        assert re.search(rf"\b{source.stem}\.{kernel}(_kernel)?\b", scripts), kernel


class Kernel:
    """Stands for a compiled and a plain kernel: keeps the grids and arguments it is launched with."""

    def __init__(self, made: "Kernel | None" = None) -> None:
        self.made, self.calls = made, []

    def __getitem__(self, grid):
        def launch(*values, **options):
            self.calls.append((grid, [v for v in values if not isinstance(v, torch.Tensor)], options))
            return self.made

        return launch


def test_a_compiled_kernel_is_launched_again_where_arguments_look_alike():
    compiled = Kernel()
    kernel = Kernel(compiled)
    launcher = Launcher(kernel, debug=True)
    launcher((3,), (torch.zeros(4), 7, 0.5), (True,), warps=4)
    launcher((5,), (torch.ones(9)[1:], 1, 2.0), (True,), warps=4)
    assert kernel.calls == [((3,), [7, 0.5, True], {"num_warps": 4, "debug": True})]
    assert compiled.calls == [((5, 1, 1), [1, 2.0, True], {})]


@pytest.mark.parametrize(
    ("values", "constants", "warps"),
    [
        ((torch.zeros(4, dtype=torch.float16), 7), (True,), 4),
        ((torch.zeros(4), 2**31), (True,), 4),
        ((torch.zeros(4), 7), (False,), 4),
        ((torch.zeros(4), 7), (True,), 8),
        ((torch.zeros(4, device="meta"), 7), (True,), 4),
    ],
)
def test_another_type_constant_or_device_is_compiled_for_itself(values, constants, warps):
    kernel = Kernel(Kernel())
    launcher = Launcher(kernel)
    launcher((1,), (torch.zeros(4), 7), (True,), warps=4)
    launcher((1,), values, constants, warps)
    assert len(kernel.calls) == 2


def test_under_the_interpreter_nothing_is_kept():
    kernel = Kernel(None)
    launcher = Launcher(kernel)
    for _ in range(2):
        launcher((1,), (torch.zeros(4),), (), warps=4)
    assert len(kernel.calls) == 2

"""Every kernel of the package is compiled by a test; what a launcher keeps follows from how arguments look."""

import ast
import re
from collections.abc import Iterator
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


def launches(node: ast.AST, guarded: bool = False) -> Iterator[tuple[str, bool]]:
    """Launches ``kernel[grid](...)`` below a node, and whether each stands in ``with ...device_of(...)``."""
    if isinstance(node, ast.With):
        guarded |= any("device_of(" in ast.unparse(item) for item in node.items)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
        yield ast.unparse(node.func.value), guarded
    for child in ast.iter_child_nodes(node):
        yield from launches(child, guarded)


def test_every_launch_is_on_the_device_of_its_tensors():
    """Triton's own choice is the current device, which is another one for a model on `cuda:1`."""
    found = {}
    for source in [*SOURCES, SOURCES[0].with_name("triton_support.py")]:
        found |= {f"{source.stem}: {name}": guarded for name, guarded in launches(ast.parse(source.read_text()))}
    assert [name for name, guarded in found.items() if not guarded] == []
    assert len(found) == 13


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

"""Importing the losses needs PyTorch and nothing else of what tailseg installs."""

import subprocess
import sys

# PyTorch may load what it likes beforehand; after that, every library but PyTorch and NumPy counts as not installed.
SCRIPT = """
import importlib.abc, sys
import torch
import torch.distributed

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first in ("torch", "triton", "numpy", "tailseg") or first in sys.stdlib_module_names:
            return None
        raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())
before = set(sys.modules)
import tailseg
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert loaded - sys.stdlib_module_names == {"tailseg"}, loaded

loss = tailseg.SeesawLoss(num_classes=3)
logits = torch.zeros(2, 3, requires_grad=True)
loss(logits, torch.tensor([0, 2])).backward()
assert loss.counts.tolist() == [1, 0, 1]
assert tailseg.NormalizedLinear(4, 3, temperature=20.0)(torch.ones(2, 4)).shape == (2, 3)
assert all(made(4) is not None for made in tailseg.losses.CLASSIFICATIONS.values())
assert issubclass(tailseg.UserError, Exception)
"""


def test_the_losses_import_pytorch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_tailseg_loads_no_library() -> None:
    """Not even PyTorch, which takes seconds."""
    script = "import sys; before = set(sys.modules); import tailseg; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"tailseg"}

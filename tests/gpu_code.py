"""Scripts that need Triton's interpreter off, which the tests themselves run under."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest


@cache
def lines_of(script: Path) -> list[list[str]]:
    """Words of what a script beside a test prints; it compiles kernels, for which no GPU is needed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    if "Cannot find ptxas" in done.stderr:
        pytest.skip("this Triton came without ptxas, NVIDIA's assembler")
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]

"""The notebooks run from top to bottom, and are kept without outputs."""

import ast
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


def run(name: str, folder: Path) -> list[str]:
    """What the code cells print or show, each as one text."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return ["".join(map(_shown, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]


def _shown(output: Any) -> str:
    data = output.get("data", {})
    return str(output.get("text", "") + data.get("text/plain", "") + ("<picture>" if "image/png" in data else ""))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tailseg` is the one under test, and the kernel this Python."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "tailseg"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tailseg "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    kernel = tmp_path / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        f'{{"argv": ["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"], '
        '"display_name": "Python 3", "language": "python"}'
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))


@pytest.mark.nightly
@pytest.mark.usefixtures("commands")
def test_own_data(tmp_path: Path) -> None:
    drawn, classes, metrics, picture, shapes = run("own_data", tmp_path)
    assert drawn.startswith("16 training and 4 validation images of 4 classes")
    assert len(re.findall(r" [rcf] +\d+ images$", classes, re.MULTILINE)) == 4
    assert "'APr'" in metrics
    assert picture.endswith("<picture>")
    assert re.search(r"\(torch.Size\(\[\d+, 64, 64\]\), torch.Size\(\[\d+, 4\]\)\)", shapes)
    assert (tmp_path / "runs" / "first" / "last.safetensors").is_file()


@pytest.mark.usefixtures("commands")
def test_the_loss_alone(tmp_path: Path) -> None:
    *_, table, counts = run("loss_alone", tmp_path)
    before, after = (float(part.rstrip("%")) for part in table.splitlines()[-1].split() if part.endswith("%"))
    assert after > before + 5  # points of the three rarest classes: what the text says
    assert len(ast.literal_eval(counts)) == 10


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_outputs_are_not_kept(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)

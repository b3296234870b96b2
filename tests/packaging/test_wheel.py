"""The wheel: what it holds, and that it works where no checkout is."""

import os
import re
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

builders = pytest.importorskip("hatchling.builders.wheel")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    (path,) = builders.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(path)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "src" / "tailseg"
    wanted = {
        f"tailseg/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = set(zipfile.ZipFile(wheel).namelist())
    about = f"tailseg-{PROJECT['version']}.dist-info"
    assert {name for name in held if not name.startswith(about)} == wanted
    assert {"tailseg/py.typed", "tailseg/recipes/ladder.json", "tailseg/visualize/templates/page.html"} <= wanted
    assert {f"{about}/licenses/LICENSE", f"{about}/entry_points.txt"} <= held
    assert wheel.name == f"tailseg-{PROJECT['version']}-py3-none-any.whl"
    assert wheel.stat().st_size < 2_000_000


def test_its_description_is_complete(wheel: Path) -> None:
    about = f"tailseg-{PROJECT['version']}.dist-info/METADATA"
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(about).decode())
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_it_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment that has the wheel and, of this one, the libraries."""
    venv.create(tmp_path / "fresh", symlinks=True)
    python = tmp_path / "fresh" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run([*install, "--no-index", "--disable-pip-version-check"], check=True)
    (packages,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))  # last: the wheel comes first
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def output(*line: str) -> str:
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = str(python.with_name("tailseg"))
    assert output(command, "--version") == f"tailseg {PROJECT['version']}\n"
    assert "table2/12-tta" in output(command, "recipes", "list")
    where = output(str(python), "-c", "import tailseg; print(tailseg.__file__)")
    assert Path(where.strip()).is_relative_to(packages)


def test_one_version_everywhere() -> None:
    version = PROJECT["version"]
    assert re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    assert re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]


def test_the_extras_that_the_documentation_names_exist() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        extra.strip()
        for page in pages
        for group in re.findall(r"pip install ['\"]?(?:\.|tailseg)\[([\w, -]+)\]", page.read_text())
        for extra in group.split(",")
    }
    assert named - {"backbones"} <= set(PROJECT["optional-dependencies"])
    assert "backbones" in named

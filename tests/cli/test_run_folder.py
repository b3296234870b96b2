"""Folders of runs whose user named none."""

import sys
from pathlib import Path

import pytest

from tailseg.cli.run_folder import run_folder
from tailseg.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tailseg", "train"])
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def test_a_named_folder_is_taken():
    assert run_folder("small/seesaw", Path("x"), resume=False) == Path("x")
    assert sys.argv == ["tailseg", "train"]


def test_others_are_numbered():
    for name in ("small-seesaw", "small-seesaw-2", "small-seesaw-3"):
        folder = run_folder("small/seesaw", None, resume=False)
        assert folder == Path("runs") / name
        assert sys.argv[-2:] == ["--out", str(folder)]  # for the processes that run the same line
        folder.mkdir(parents=True)
        assert run_folder("small/seesaw", None, resume=True) == folder


@pytest.mark.parametrize(
    ("recipe", "name"), [("my run", "my-run"), ("../../etc", "etc"), ("Füchse", "Füchse"), ("...", "run"), ("", "run")]
)
def test_names_are_made_fit_for_files(recipe, name):
    assert run_folder(recipe, None, resume=False) == Path("runs") / name


def test_nothing_to_resume():
    with pytest.raises(UserError, match=r"^runs/small-seesaw: there is no such run to resume; name its folder with"):
        run_folder("small/seesaw", None, resume=True)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_of_others_need_one_folder(monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UserError, match=r"^--out: the processes of torchrun or SLURM need one folder"):
        run_folder("small/seesaw", None, resume=False)
    assert run_folder("small/seesaw", Path("x"), resume=False) == Path("x")

"""The README and the guide say what the program does."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tailseg.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page.read_text(), ""):
            for line in block.splitlines():
                if line.startswith("tailseg "):
                    yield pytest.param(line.split("#")[0], id=f"{page.name}: {line[:40]}")


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_in_the_pages_exists_with_its_options(line):
    words = shlex.split(line.replace("[", " ").replace("]", " ").replace("...", ""))[1:]
    command = typer.main.get_command(app)
    while getattr(command, "commands", None):
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, line


def test_the_loss_example_prints_what_the_readme_says():
    example = next(block for block in blocks((ROOT / "README.md").read_text(), "python") if "SeesawLoss" in block)
    printed = re.search(r"print\(.*\)  # (.*)$", example, re.MULTILINE).group(1)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == printed


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        targets = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
        assert all((page.parent / target).exists() for target in targets), page

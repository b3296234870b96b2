"""The README and the guide say what the program does."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tailseg.cli.main import app

ROOT = Path(__file__).parents[1]
FENCES = re.MULTILINE | re.DOTALL
OURS = re.compile(
    r"https://(github\.com/tailseg/tailseg/(blob|tree)|raw\.githubusercontent\.com/tailseg/tailseg)/main/"
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands():
    """Commands in blocks, on lines of their own or given to a container, and in the text."""
    for page in PAGES:
        text = page.read_text()
        for block in blocks(text, ""):
            for line in block.splitlines():
                line = re.sub(r"^docker run .* tailseg:\w+ ", "tailseg ", line)
                if line.startswith("tailseg "):
                    yield pytest.param(line.split("#")[0], id=f"{page.name}: {line[:40]}")
        for line in sorted(set(re.findall(r"`(tailseg [a-z][^`]*)`", re.sub(r"^```.*?^```", "", text, flags=FENCES)))):
            line = " ".join(line.split())
            yield pytest.param(line, id=f"{page.name}: {line[:40]} in the text")


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_in_the_pages_exists_with_its_options(line):
    words = shlex.split(re.sub(r"[\[\]|]|\.\.\.", " ", line))[1:]
    command = typer.main.get_command(app)
    while getattr(command, "commands", None) and words and not words[0].isupper():
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, line


def test_the_loss_example_prints_what_the_readme_says():
    example = next(block for block in blocks((ROOT / "README.md").read_text(), "python") if "SeesawLoss" in block)
    printed = re.search(r"print\(.*\)  # (.*)$", example, re.MULTILINE).group(1)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == printed


def links(page):
    return re.findall(r"\]\(([^)#]+)", page.read_text())


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for link in links(page):
            of_the_repository = OURS.match(link)
            if of_the_repository:
                assert (ROOT / link[of_the_repository.end() :]).exists(), (page, link)
            elif not link.startswith("http"):
                assert (page.parent / link).exists(), (page, link)


def test_the_readme_has_no_relative_link():  # a package index shows it without the files beside it
    assert [link for link in links(ROOT / "README.md") if not link.startswith("https://")] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_demo_installs_what_a_user_needs(tmp_path):
    def commands_of(target):
        line = ["make", "--dry-run", f"VENV={tmp_path / 'venv'}", target]
        return subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert "'.[backbones]'" in commands_of("demo")
    assert "[dev]" not in commands_of("demo")
    assert "'.[dev]'" in commands_of("lint")
    # The developers' environment serves the demo too.
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for stamp in (".installed", ".installed-for-users"):
        (tmp_path / "venv" / stamp).touch()
    assert "pip install" not in commands_of("demo")

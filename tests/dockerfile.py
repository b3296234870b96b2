"""The Dockerfile, read; run as a script, its steps without a container engine: in a clean virtual environment.

    python tests/dockerfile.py cpu

What changes the system (users, Debian packages) is left out and said; paths of the image lie below a temporary folder.
`CONTAINER_INDEX` stands in for PyTorch's index of wheels, where that cannot be reached.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SYSTEM = re.compile(r"\b(useradd|apt-get)\b")
PYTORCH = re.compile(r"https://download\.pytorch\.org/\S+")
PLACES = ("/source", "/dist", "/work", "/cache")  # of the image


@dataclass
class Stage:
    """One FROM of a Dockerfile with its instructions, continuation lines joined."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # (instruction, argument)


def stages(text: str) -> dict[str, Stage]:
    """Stages of a Dockerfile by name."""
    found: dict[str, Stage] = {}
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    last = ""
    for line in filter(None, map(str.strip, lines)):
        word, _, argument = line.partition(" ")
        if word == "FROM":
            base, _, last = argument.partition(" AS ")
            found[last] = Stage(base, last)
        else:
            found[last].steps.append((word, argument.strip()))
    return found


def steps_of(target: str, all_stages: dict[str, Stage]) -> list[tuple[str, str]]:
    """Instructions that make a target, in their order: those of the stages below it and that it copies from first."""
    stage = all_stages[target]
    steps = steps_of(stage.base, all_stages) if stage.base in all_stages else []
    for word, argument in stage.steps:
        copied = re.match(r"--from=(\w+)", argument) if word == "COPY" else None
        if copied:
            steps += steps_of(copied[1], all_stages)
        steps.append((word, argument))
    return steps


def _run_steps(target: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        image = Path(temporary)
        venv.create(image / "python", with_pip=True)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["PATH"] = f"{image / 'python' / 'bin'}{os.pathsep}{environment['PATH']}"
        place = image

        def inside(text: str) -> str:
            return re.sub(rf"(?<![\w/.])({'|'.join(PLACES)})\b", rf"{image}\1", text)

        for word, argument in steps_of(target, stages((ROOT / "Dockerfile").read_text())):
            print(f"{word} {argument}", flush=True)
            if word == "WORKDIR":
                place = Path(inside(argument))
                place.mkdir(parents=True, exist_ok=True)
            elif word == "COPY" and not argument.startswith("--from"):
                *names, _ = argument.split()
                for name in names:
                    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                    copy(ROOT / name, place / name)
            elif word == "ENV":
                environment |= dict(pair.split("=", 1) for pair in inside(argument).split())
            elif word == "RUN" and SYSTEM.search(argument):
                print("  left out: it changes the system", flush=True)
            elif word == "RUN":
                index = os.environ.get("CONTAINER_INDEX")
                line = PYTORCH.sub(index, argument) if index else argument
                subprocess.run(["sh", "-c", inside(line)], check=True, cwd=place, env=environment)
        for line in ("tailseg --version", "tailseg recipes list", "tailseg app --help"):
            subprocess.run(line.split(), check=True, cwd=place, env=environment, stdout=subprocess.DEVNULL)
        print(f"{target}: its steps are done, and tailseg runs")


if __name__ == "__main__":
    _run_steps(sys.argv[1] if len(sys.argv) > 1 else "cpu")

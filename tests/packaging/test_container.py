"""Dockerfile and compose.yaml name what exists; `python tests/dockerfile.py` runs the steps themselves."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from dockerfile import Stage, stages, steps_of

from tailseg.cli.main import app

ROOT = Path(__file__).parents[2]
STAGES = stages((ROOT / "Dockerfile").read_text())
TARGETS = ("cpu", "cuda")


def test_stages_are_read_with_their_continued_lines() -> None:
    read = stages("FROM a AS one\nRUN x \\\n  y\n# no\nFROM one AS two\nCOPY --from=one /a /b\nUSER 1\n")
    assert read == {
        "one": Stage("a", "one", [("RUN", "x    y")]),
        "two": Stage("one", "two", [("COPY", "--from=one /a /b"), ("USER", "1")]),
    }
    assert [word for word, _ in steps_of("two", read)] == ["RUN", "RUN", "COPY", "USER"]


def test_what_is_copied_exists_and_goes_to_the_engine() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        name
        for stage in STAGES.values()
        for word, argument in stage.steps
        if word == "COPY" and not argument.startswith("--from")
        for name in argument.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    # All that the project file names for the wheel.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [project["project"]["readme"], *project["project"]["license-files"]]
    named += [path.partition("/")[0] for path in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    assert {"pyproject.toml", *named} == copied
    assert not any(fnmatch.fnmatch(name, rules[-1]) for name in copied)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_installs_the_wheel_with_extras_that_exist_and_does_not_run_as_root(target: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    steps = steps_of(target, STAGES)
    installed = [argument for word, argument in steps if word == "RUN" and "/dist/" in argument]
    assert len(installed) == 1
    (asked,) = re.findall(r"\.whl\)\[([\w,]+)\]", installed[0])
    assert set(asked.split(",")) <= set(extras)
    last = dict(steps)
    assert last["USER"] == "1000"
    assert json.loads(last["ENTRYPOINT"]) == ["tailseg"]
    assert ("gcc" in " ".join(argument for _, argument in steps)) == (target == "cuda")  # for Triton


def services() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text())["services"])


def test_the_services_build_the_targets_and_are_seen_by_this_machine_only() -> None:
    found = services()
    assert {service["build"]["target"] for service in found.values()} == set(TARGETS) <= set(STAGES)
    for service in found.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert any(volume.endswith("/models:ro") for volume in service["volumes"])


def test_the_services_run_a_command_that_exists_with_its_options() -> None:
    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009  (Click's, which typer hides)
    for service in services().values():
        name, model, *options = service["command"]
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {option for option in options if option.startswith("--")} <= known
        assert model.startswith("/models/")
        port = options[options.index("--port") + 1]
        assert all(published.endswith(f":{port}") for published in service["ports"])
        assert f":{port}/" in service["healthcheck"]["test"][-1]


def test_caches_lie_where_the_service_keeps_them() -> None:
    environment = dict(
        pair.split("=", 1) for word, argument in STAGES["base"].steps if word == "ENV" for pair in argument.split()
    )
    caches = {name: value for name, value in environment.items() if name != "MPLCONFIGDIR"}
    assert all(Path(value).is_relative_to("/cache") for value in caches.values())
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    assert "TAILSEG_CACHE" in source
    for service in services().values():
        assert "cache:/cache" in service["volumes"]

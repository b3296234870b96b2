"""The workflows: they are YAML, run what is there, and take actions by the hash of their content."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RIGHTS = {
    "release": {"publish": {"id-token": "write"}},
    "docs": {"publish": {"id-token": "write", "pages": "write"}},
}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_rights_are_few(path: Path) -> None:
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name)] == []
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    asked = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert asked == RIGHTS.get(path.stem, {})
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_what_they_run_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in WORKFLOWS:
        for line in "\n".join(step.get("run", "") for step in steps(path)).splitlines():
            for target in re.findall(r"^make (\w+)", line):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
            for folder in re.findall(r"\b((?:tests|docs)/[\w/.]+)", line):
                assert (ROOT / folder).exists(), line


def test_a_release_is_published_only_after_the_wheel_was_tried() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert (jobs["try"]["needs"], jobs["publish"]["needs"]) == ("build", "try")
    assert jobs["publish"]["environment"]["name"] == "pypi"
    tried = " ".join(step.get("run", "") + step.get("uses", "") for step in jobs["try"]["steps"])
    assert "demo --quick" in tried
    assert "checkout" not in tried

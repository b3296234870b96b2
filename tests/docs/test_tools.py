"""The code on the page about other tools is that of the examples, and their files are those it names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "supervision": "supervision_slices",
    "SAHI": "sahi_slices",
    "Objects followed through a video": "supervision_tracks",
    "FiftyOne": "fiftyone_results",
}
PARTS = re.split(r"^#{2,3} (.*)\n", (ROOT / "docs" / "tools.md").read_text(), flags=re.MULTILINE)


def unspaced(code: str) -> str:
    """Code without its indentation and blank lines, which a part of a file has of its own on a page."""
    return "".join(code.split())


@pytest.mark.parametrize("title", SECTIONS)
def test_the_code_on_the_page_is_that_of_the_example(title: str) -> None:
    section = PARTS[PARTS.index(title) + 1]
    code = (ROOT / "examples" / f"{SECTIONS[title]}.py").read_text()
    shown = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert shown
    assert [block for block in shown if unspaced(block) not in unspaced(code)] == []


def test_the_table_names_every_example_of_the_page() -> None:
    table = set(re.findall(r"\| \[`(\w+)\.py`\]\(\.\./examples/\1\.py\)", PARTS[0]))
    assert table == set(SECTIONS.values())
    assert all(len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 100 for name in table)

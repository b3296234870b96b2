"""The documentation site: pages of the program, links, and a strict build."""

import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import tailseg
from tailseg.recipes.model_section import NeckRecipe

ROOT = Path(__file__).parents[2]
RAW = "https://raw.githubusercontent.com/tailseg/tailseg/main/"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "site"))
        import make_site

        return make_site


@pytest.fixture(scope="module")
def pages(build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "pages"
    build.gather(folder)
    return Path(folder)


def leaves(entries: list[dict[str, object]]) -> list[str]:
    found: list[str] = []
    for entry in entries:
        for inside in entry.values():
            found += leaves(inside) if isinstance(inside, list) else [str(inside)]
    return found


def test_the_site_builds_without_a_warning_and_leaves_no_markdown(build: ModuleType, pages: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    config = build.configure(pages)
    line = build.command(config)
    done = subprocess.run(
        line, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "true"}, cwd=pages
    )
    assert done.returncode == 0, done.stdout + done.stderr
    navigation = re.search(r"^nav:\n(?:[ -].*\n)*", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert navigation is not None
    named = leaves(yaml.safe_load(navigation[0])["nav"])
    assert len(named) == len(set(named)) > 30
    site = config.parent / "site"
    for name in named:
        folder = site / name.removesuffix(".md").removesuffix("index")
        html = (folder / "index.html").read_text()
        text = re.sub(r"<(pre|script|svg|code)\b.*?</\1>", "", html, flags=re.DOTALL)
        assert not re.search(r"<code>[^<]*\\\|", html), name
        assert not re.search(r"<p>[^<]*\n(- |\|)", text), name  # a list or a table that was taken for text
        assert not re.search(r"(```|\]\(|\*\*|^:::)", re.sub(r"<[^>]*>", "", text), re.MULTILINE), name
    interface = "".join((site / place.removesuffix(".md") / "index.html").read_text() for place in build.reference.API)
    for name in tailseg.__all__:
        if name not in ("__version__", "losses", "recipes", "hub"):
            assert f">{name}<" in interface, name
    assert "Lowest score shown." in (site / "command-line" / "index.html").read_text()


def test_every_public_name_is_on_a_page(build: ModuleType) -> None:
    named = [name for _, names in build.reference.API.values() for name in names]
    assert sorted([*named, "__version__"]) == sorted([*tailseg.__all__, "runtime"])


def test_the_command_line_is_that_of_the_program(pages: Path) -> None:
    page = (pages / "command-line.md").read_text()
    assert "\n## tailseg train\n\n```\ntailseg train RECIPE --data DATA [OPTIONS]\n```\n" in page
    assert "| `--seed N` | `0` | Seed of all random numbers. |" in page
    assert "| `--format json|coco|yolo|labelme|cvat` |" in page
    assert "\n## tailseg data convert yolo\n" in page or "\n## tailseg data convert\n" in page
    assert "\n## tailseg hub push\n" in page


def test_recipe_keys_have_types_defaults_and_meanings(pages: Path) -> None:
    page = (pages / "recipe-keys.md").read_text()
    kind = NeckRecipe.model_fields["kind"]
    assert f"` | `{kind.default}` | {kind.description} |\n| `model.neck.channels` | `whole number` | `256` |" in page
    assert "| `model.stages.N.iou` | `number` |" in page
    assert "\n## classifier, seesaw\n" in page
    assert "| `training.precision` | `fp32 | bf16 | auto` | `fp32` |" in page
    assert "<class" not in page
    assert "typing." not in page


@pytest.mark.parametrize(
    ("link", "source", "place", "wanted"),
    [
        ("train.md#loss", "docs/data.md", "data.md", "train.md#loss"),
        ("../images/table1.png", "docs/results/table1.md", "results/table1.md", "../images/table1.png"),
        ("../examples/digits.py", "docs/anywhere.md", "anywhere.md", "REPOSITORYexamples/digits.py"),
        ("CHANGELOG.md", "README.md", "index.md", "changelog.md"),
        ("REPOSITORYdocs/results/rare.md#a", "README.md", "index.md", "results/rare.md#a"),
        (f"{RAW}docs/images/x.jpg", "README.md", "index.md", "images/x.jpg"),
        ("https://arxiv.org/abs/2008.10032", "README.md", "index.md", "https://arxiv.org/abs/2008.10032"),
        ("#here", "README.md", "index.md", "#here"),
        ("notebooks/own_data.ipynb", "docs/start.md", "start.md", "notebooks/own_data.md"),
    ],
)  # fmt: skip
def test_links_lead_to_pages_or_to_the_repository(
    build: ModuleType, link: str, source: str, place: str, wanted: str
) -> None:
    places = {path.relative_to(ROOT).as_posix(): page for page, path in build.sources().items()}
    found = build.target(link.replace("REPOSITORY", build.REPOSITORY), ROOT / source, place, places)
    assert found == wanted.replace("REPOSITORY", build.REPOSITORY)


def test_markdown_of_github_is_put_right(build: ModuleType) -> None:
    text = "words:\n- one\n- two\n\n```math\nx\n```\n```\n- code](a.md)\n```\n| `a\\|b` |\n|---|\n"
    shown = build.page_text(text, ROOT / "docs" / "a.md", "a.md", {})
    assert shown == "words:\n\n- one\n- two\n\n$$\nx\n$$\n```\n- code](a.md)\n```\n\n| `a|b` |\n|---|\n"

"""The structure of the package: who imports whom, no circles, no private names across files, sizes, mirrored tests."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tailseg"
TESTS = Path(__file__).parent
# From the bottom up: a part may import those before it. Folders and the modules beside them are parts.
ORDER = (
    *(
        "errors",
        "files",
        "wording",
        "yaml_files",
        "devices",
        "threads",
        "progress",
        "structures",
        "recipes",
        "layers",
        "losses",
        "data",
        "runtime",
        "model",
        "checkpoint",
        "hub",
    ),
    *(
        "evaluation",
        "visualize",
        "training",
        "results",
        "predict",
        "export",
        "zoo",
        "outcomes",
        "jobs",
        "app",
        "cli",
        "__main__",
    ),
)
LONGEST = 400  # lines of a file


def modules() -> dict[str, Path]:
    """Module names below the package -> their files."""
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in sorted(PACKAGE.rglob("*.py"))}


MODULES = modules()


@cache
def imports(module: str) -> tuple[tuple[str, str], ...]:
    """The modules of the package that a module imports, wherever in it, with the name that it takes from each."""
    found = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tailseg":
            base = node.module.split(".")[1:]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.append((inner if inner in MODULES else ".".join(base) or "__init__", alias.name))
        elif isinstance(node, ast.Import):
            found += [(alias.name.partition(".")[2], "") for alias in node.names if alias.name.startswith("tailseg.")]
    return tuple(found)


def part(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_imports_lead_downwards(module: str) -> None:
    upward = {found for found, _ in imports(module) if ORDER.index(part(found)) > ORDER.index(part(module))}
    assert not upward, f"{module} imports {upward}"


def test_every_part_has_its_place() -> None:
    assert {part(name) for name in MODULES} == {*ORDER, "__init__"}


def test_no_circles() -> None:
    """Following the imports from any module never leads back to it."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done:
            return
        for found, _ in imports(module):
            target = found if found in MODULES else f"{found}.__init__"
            if not target.endswith("__init__"):
                visit(target, (*path, module))
        done.add(module)

    for module in MODULES:
        if module != "__init__":
            visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_is_taken_from_another_file(module: str) -> None:
    assert not [name for _, name in imports(module) if name.startswith("_")]


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= LONGEST


def test_texts_have_an_encoding() -> None:
    """Without one, Windows takes a code page that lacks most of the world's letters."""
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            named = {keyword.arg for keyword in node.keywords}
            mode = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            opened = node.func.attr == "open" and (mode in ("r", "w", "a", "x") or "newline" in named)
            if opened or node.func.attr in ("read_text", "write_text"):
                assert "encoding" in named, f"{module}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", sorted({file.parent for file in MODULES.values()}), ids=lambda folder: folder.name)
def test_every_folder_says_what_it_holds(folder: Path) -> None:
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_a_models_recipe_is_read_without_training_code_or_pytorch() -> None:
    """All that `recipes.resolve` imports, and what that imports, lies in recipes/, errors, wording and yaml_files."""
    reached, waiting = set(), ["recipes.resolve"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [found for found, _ in imports(module) if found in MODULES]
    assert {part(module) for module in reached} == {"recipes", "errors", "yaml_files"}
    lines = [line for module in reached for line in MODULES[module].read_text().splitlines()]
    assert not [line for line in lines if line.strip().startswith(("import torch", "from torch"))]


def test_settings_are_changed_by_their_keys() -> None:
    """`model_copy(update=...)` would skip validation: a misspelt key would be accepted."""
    assert not [name for name, file in MODULES.items() if "model_copy(" in file.read_text()]


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "data" and not name.endswith("__init__")])
def test_every_data_module_has_its_test_file(module: str) -> None:
    *folders, name = module.split(".")
    assert TESTS.joinpath(*folders, f"test_{name}.py").is_file()

"""The arrows between the folders go one way, which is what keeps the layout true in a year."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import asymlift

PACKAGE = Path(asymlift.__file__).parent

MATHS = {*sys.stdlib_module_names, "torch", "einops"}
UPPER = {"embedded", "stages", "cli"}
FORBIDDEN = {  # folder -> parts of the package it must not import: each stands on those before it
    "families": {"data", "report", "artifacts", "runtime", "model", *UPPER},
    "artifacts": {"data", "report", "runtime", "model", *UPPER},
    "data": {"report", "runtime", "model", *UPPER},
    "report": {"artifacts", "runtime", "model", *UPPER},
    "runtime": {"model", *UPPER},
    "model": UPPER,
    "embedded": {"model", "stages", "cli"},
}


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it: also inside functions, also relative."""
    package = [PACKAGE.name, *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def parts(file: Path) -> set[str]:
    """The folders and modules of this package that a file imports."""
    return {name.split(".")[1] for name in imports(file) if name.startswith(f"{PACKAGE.name}.")}


FILES = sorted(PACKAGE.rglob("*.py"))
by_file = pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())


@by_file
def test_imports_follow_the_arrows(file):
    folder = file.relative_to(PACKAGE).parts[0]
    assert not parts(file) & FORBIDDEN.get(folder, set())


@by_file
def test_only_the_entry_point_imports_the_command_line(file):
    assert "cli" not in parts(file) or file == PACKAGE / "__main__.py"


def test_maths_knows_only_torch_einops_and_the_standard_library():
    for file in FILES:
        if file.is_relative_to(PACKAGE / "maths"):
            foreign = {name for name in imports(file) if name.split(".")[0] not in MATHS}
            assert all(name.startswith("asymlift.maths.") for name in foreign), (file, foreign)


def test_relative_imports_and_imports_inside_functions_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "asymlift")
    file = tmp_path / "asymlift" / "data" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    from ..model import y\n    from .. import cli\n    import a.b\n")
    assert set(imports(file)) == {"asymlift.model.y", "asymlift.cli", "a.b"}
    assert parts(file) == {"model", "cli"}

"""README says what is so: its commands exist, its files are there, its recipes load."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asymlift.cli import app
from asymlift.errors import Exit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [line.strip() for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [re.sub(r"\s+#.*", "", line) for line in LINES if "asymlift " in line]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line, monkeypatch, tmp_path):
    """Usage errors are exit 2; without its input a command ends otherwise."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    words = words[words.index("asymlift") + 1 :]

    result = CliRunner().invoke(app, words)

    assert result.exit_code != Exit.USAGE, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_the_two_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert "make demo" in README
    assert "make test" in README
    assert {"setup", "demo", "test", "check", "bench", "chaos"} <= set(targets)


@pytest.mark.parametrize("page", ["README.md", "docs/porting.md"])
def test_every_file_that_is_linked_is_there(page):
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())

    assert linked
    assert not [path for path in linked if not ((ROOT / page).parent / path).exists()]

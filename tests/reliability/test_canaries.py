"""No command prints or writes a secret, neither of the environment nor of a URL."""

import pytest

from asymlift.errors import Exit
from tests.reliability.attacks import Built
from tests.reliability.canaries import search
from tests.reliability.jail import Cell
from tests.stages.small_run import build


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canaries")
    build(folder / "built")
    return search(Cell(folder / "cell"), Built(folder / "built"), ["password"])


def test_nothing_leaks(found):
    assert found.leaks == []


def test_much_was_looked_through(found):
    assert found.commands > 20
    assert found.num_bytes > 100_000
    assert {Exit.DONE, Exit.UNEXPECTED, Exit.BAD_DATA, Exit.BAD_RECIPE} <= set(found.exits.values())

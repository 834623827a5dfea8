"""Hostile inputs: no code of theirs runs, nothing is written outside, memory has a bound, and all
there is to see is a message. benchmarks/reliability/attacks.py has more, with every command.
"""

import pytest

from tests.reliability.attack_data import shard_attacks
from tests.reliability.attack_models import basis_attacks, lifted_attacks, manifest_attacks
from tests.reliability.attacks import make_built, problems_of, recipe_attacks
from tests.reliability.jail import Cell, Warden

QUICK = [
    *recipe_attacks(),
    *(attack for attack in basis_attacks() if "header" not in attack.name),
    *(attack for attack in shard_attacks() if "at once" not in attack.name),
    *(attack for attack in manifest_attacks() if attack.name.startswith("lifted")),
    *(attack for attack in lifted_attacks() if "transformer" not in attack.name),
]


@pytest.fixture(scope="module")
def warden():
    with Warden() as warden:
        yield warden


@pytest.fixture(scope="module")
def built(warden, tmp_path_factory):
    return make_built(tmp_path_factory.mktemp("built"), warden, trained=False)


@pytest.mark.parametrize("attack", QUICK, ids=lambda attack: attack.name)
def test_an_attack_ends_in_a_message(attack, warden, built, tmp_path):
    cell = Cell(tmp_path / "cell")
    command, exits = attack.prepare(cell, built)[0]

    problems, outcome = problems_of(warden, cell, command, exits)

    assert problems == [], outcome.output

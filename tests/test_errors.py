"""Exit codes are a promise to job scripts."""

import pytest

from asymlift import errors
from asymlift.errors import Exit, StoppedEarly, UserError


@pytest.mark.parametrize(
    "kind, code",
    [("BadData", 65), ("Unavailable", 69), ("CannotWrite", 73), ("BadRecipe", 78)],
)
def test_every_kind_of_error_has_its_own_code(kind, code):
    error = getattr(errors, kind)("what, why, what to do")
    assert isinstance(error, UserError) and error.exit == code
    assert str(error) == "what, why, what to do"


def test_stopping_early_is_resumable_unless_somebody_pressed_ctrl_c():
    assert StoppedEarly("saved").exit == 75
    assert StoppedEarly("saved", Exit.INTERRUPTED).exit == 130
    assert StoppedEarly("again").exit == 75  # the one before changed no class
    assert UserError("x").exit == 1 and Exit.DONE == 0 and Exit.USAGE == 2

"""Updates that are not finite: left out, counted, written down, and too many end the run."""

from collections.abc import Callable, Sequence
from pathlib import Path

from asymlift.errors import BadData
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.log import Notes

NAMED = 8  # samples that a message names; the file has all


class Guard:
    """Judges every update. Every rank has to call, with what all ranks agree on."""

    def __init__(
        self, file: Path, ranks: Ranks, most_in_a_row: int, warn: Callable[[str], None]
    ) -> None:
        self.notes, self.ranks, self.most_in_a_row = Notes(file, warn), ranks, most_in_a_row
        self.warn = warn
        self.in_a_row = 0  # also over restarts: a checkpoint holds it

    def passes(
        self, step: int, loss: float, norm: float, applied: bool, keys: Sequence[str]
    ) -> bool:
        """Whether the update was made; `keys` are those of this rank's samples."""
        if applied:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        everyone = [key for some in dist.gathered(self.ranks, list(keys)) for key in some]
        line = {"step": step + 1, "loss": repr(loss), "norm": repr(norm), "keys": everyone}
        if self.ranks.first:
            self.notes.add([line])
        named = ", ".join(everyone[:NAMED]) + (", ..." if len(everyone) > NAMED else "")
        said = f"step {step + 1}: loss {loss}, gradient norm {norm}; samples {named}"
        if self.in_a_row >= self.most_in_a_row:
            raise BadData(
                f"{said}\n{self.in_a_row} updates in a row were not finite, and none of them was "
                "made; lower the learning rate, or look at the samples: all are named in\n"
                f"{self.notes.path}"
            )
        self.warn(f"{said}; the update was left out")
        return False

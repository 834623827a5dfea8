"""How fast weights move and are averaged, as pure functions of the step."""

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    steps: int,
    *,
    kind: Literal["constant", "linear", "cosine"],
    warmup: int,
    decay_from: float,
    floor: float,
) -> float:
    """The factor on the learning rate of update `step` (from 0) of `steps`.

    Rises linearly over `warmup` updates; after the share `decay_from` of the run it falls to
    `floor`, which the last update would be the first to undercut.
    """
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    begin = decay_from * steps
    if kind == "constant" or step < begin:
        return rising
    done = (step - begin) / max(steps - begin, 1)  # 0 to just below 1
    left = 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return rising * (floor + (1 - floor) * left)


def karras_decay(updates: int, gamma: float) -> float:
    """(1 - 1/(n+1))^(gamma+1) after n averaged updates; 0, a plain copy, before the first.

    The power-function average (Karras et al. 2024, EDM2): update n counts in proportion to the
    integral of t^gamma from n to n + 1.
    """
    return 0.0 if updates <= 0 else (1 - 1 / (updates + 1)) ** (gamma + 1)

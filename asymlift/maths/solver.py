"""Fixed-grid solvers of dx/dsigma = u, from the first noise level given to the last."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, sigma: a scalar) -> u, like x
OnStep = Callable[[int, Tensor], None]  # (steps done, x)


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """First order; the solver that commutes with the lift, for any number of steps."""
    for step, (sigma, following) in enumerate(pairwise(sigmas), start=1):
        x = x + (following - sigma) * velocity(x, sigma)
        if on_step:
            on_step(step, x)
    return x


def heun(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Second order, two evaluations a step; a step that ends at sigma = 0 is an Euler step."""
    for step, (sigma, following) in enumerate(pairwise(sigmas), start=1):
        slope = velocity(x, sigma)
        euler_x = x + (following - sigma) * slope
        if following > 0:  # at 0 the complement of u would be divided by the floor
            slope = (slope + velocity(euler_x, following)) / 2
            x = x + (following - sigma) * slope
        else:
            x = euler_x
        if on_step:
            on_step(step, x)
    return x

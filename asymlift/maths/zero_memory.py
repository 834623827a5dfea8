"""What DeepSpeed ZeRO (0.19.8) holds of weights, gradients and optimizer state, in bytes per rank.

P trained float32 numbers on N ranks. Read off its source, and checked against what the engine
allocates: benchmarks/plan_memory.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Device = Literal["cuda", "cpu"]
FLOAT32 = 4
ALL_REDUCE_NUMBERS = 500_000_000  # stage 0 reduces so many at once, whatever is configured


@dataclass(frozen=True)
class Point:
    """A moment of a backward pass: bytes beside weights and gradients, gradients made by then."""

    live: int
    gradients: int


@dataclass(frozen=True)
class Weights:
    """What a model consists of."""

    frozen: int  # bytes of everything that does not train
    groups: tuple[int, ...]  # P of each of the optimizer's groups
    largest: int  # numbers of the largest tensor that trains
    gathered: int  # bytes that stage 3 holds whole at its highest

    @property
    def trained(self) -> int:
        return sum(self.groups)


@dataclass(frozen=True)
class ZeroSettings:
    """How the weights are spread, and how gradients travel."""

    stage: int
    world: int  # N
    accumulation: int
    bucket: int  # numbers that are reduced at once: reduce_bucket_size
    state_bytes: float  # of the optimizer, per trained number
    offload: Literal["none", "optimizer", "all"] = "none"
    dtypes: tuple[int, ...] = (FLOAT32,)  # bytes of a number, in each dtype that gradients travel


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes. What is not said to be the host's is on the device."""

    frozen: int
    trained: int
    optimizer: int
    master: int = 0  # a second copy of what trains, which the optimizer updates
    buffers: int = 0  # always there
    gradient_buffer: int = 0  # likewise
    waiting: int = 0  # gradients, and what holds them, between two micro-batches
    gradients_grow: bool = False  # all of them are whole until the backward pass has ended
    from_first_gradient: int = 0  # buffers that are made in the backward pass
    gathered: int = 0  # whole copies of partitioned weights, in a forward or backward pass
    reduce: int = 0  # at the end of the backward pass, when activations are gone
    update: int = 0  # while the optimizer runs
    host: int = 0

    @property
    def resident(self) -> int:
        """What is there whatever happens."""
        stays = self.frozen + self.trained + self.optimizer + self.master
        return stays + self.buffers + self.gradient_buffer

    def pass_peak(self, curve: Sequence[Point]) -> int:
        """The highest of a forward and backward pass, beside `resident`."""
        on_the_way = (
            point.live
            + (point.gradients if self.gradients_grow else 0)
            + (self.from_first_gradient if point.gradients else 0)
            for point in curve
        )
        return max(max(on_the_way) + self.waiting + self.gathered, self.reduce)


def zero_memory(weights: Weights, use: ZeroSettings, device: Device) -> ZeroMemory:
    """Split weights, gradients, optimizer state and buffers as DeepSpeed does."""
    split = (without_zero, states_split, states_split, everything_split)[use.stage]
    found = split(weights, use, device)
    return found if use.offload == "none" else offloaded(found, weights, use)


def without_zero(weights: Weights, use: ZeroSettings, device: Device) -> ZeroMemory:
    """Stage 0: every rank holds everything, and reduces copies of the gradients."""
    whole = FLOAT32 * weights.trained
    several = use.accumulation > 1
    return ZeroMemory(
        frozen=weights.frozen,
        trained=whole,
        optimizer=round(use.state_bytes * weights.trained),
        waiting=whole if several else 0,
        gradients_grow=not several,
        reduce=whole + FLOAT32 * min(ALL_REDUCE_NUMBERS, weights.trained),
        update=whole + roots(max(weights.groups), device),
    )


def states_split(weights: Weights, use: ZeroSettings, device: Device) -> ZeroMemory:
    """Stages 1 and 2: a rank updates its share, of which it holds a second copy.

    A bucket is filled with gradients and reduced as a copy. Stage 1 fills it when all gradients
    are there, stage 2 while they are made.
    """
    whole, share = FLOAT32 * weights.trained, share_of(weights.trained, use)
    several, bucket = use.accumulation > 1, bucket_bytes(use)
    filled = FLOAT32 * min(use.bucket, weights.trained)
    lower = lower_copy(weights, use)
    if use.stage == 1:
        reduce = bucket + lower + max(whole, whole - filled + share)
    else:
        copied, second = (filled, min(filled, whole - filled)) if use.world > 1 else (0, 0)
        reduce = bucket + lower + max(copied, second + share) + (share if several else 0)
    overflows = use.stage == 2 and weights.trained > use.bucket
    early = reduce - (share if several else 0) if overflows else bucket
    keeps = use.stage == 1 and several  # the bucket, too, until it is used
    return ZeroMemory(
        frozen=weights.frozen,
        trained=whole,
        optimizer=round(use.state_bytes * weights.trained / use.world),
        master=share,
        waiting=(whole + bucket if use.stage == 1 else share) if several else 0,
        gradients_grow=use.stage == 1 and not several,
        from_first_gradient=0 if keeps else early,
        reduce=reduce,
        update=update_of_groups(weights, use, device),
    )


def update_of_groups(weights: Weights, use: ZeroSettings, device: Device) -> int:
    """One group after another is made flat; the gradients they come from go with the last."""
    averaged, sizes = share_of(weights.trained, use), []
    for position, numbers in enumerate(weights.groups, start=1):
        flat = share_of(numbers, use)
        beside = roots(flat // FLOAT32, device)
        last = position == len(weights.groups)
        sizes.append(max(averaged + flat, flat + beside) if last else averaged + flat + beside)
    return max(sizes)


def everything_split(weights: Weights, use: ZeroSettings, device: Device) -> ZeroMemory:
    """Stage 3: weights are whole only while they are used; bucket and gradients are always there.

    Float32 weights get a second copy all the same: their device is compared with a string.
    """
    share, filled = share_of(weights.trained, use), FLOAT32 * min(use.bucket, weights.trained)
    copies = 2 * filled if device == "cpu" else filled + filled // use.world
    reduce = copies + lower_copy(weights, use)
    return ZeroMemory(
        frozen=-(-weights.frozen // use.world),
        trained=share,
        optimizer=round(use.state_bytes * weights.trained / use.world),
        master=share,
        buffers=bucket_bytes(use),
        gradient_buffer=share,
        from_first_gradient=reduce if weights.trained > use.bucket else 0,
        gathered=weights.gathered,
        reduce=reduce,
        update=flat_update(weights, use, device),
    )


def offloaded(found: ZeroMemory, weights: Weights, use: ZeroSettings) -> ZeroMemory:
    """The optimizer's part on the host, with a gradient to update from; `all`: weights too."""
    share, everything = share_of(weights.trained, use), use.offload == "all"
    host = found.master + found.optimizer + 2 * share
    if everything:
        host += found.frozen + found.trained
    return replace(
        found,
        frozen=0 if everything else found.frozen,
        trained=0 if everything else found.trained,
        optimizer=0,
        master=0,
        buffers=found.buffers + FLOAT32 * weights.largest,
        gradient_buffer=0,
        waiting=found.waiting if use.stage == 1 else 0,
        update=0,
        host=host,
    )


def share_of(numbers: int, use: ZeroSettings) -> int:
    return FLOAT32 * -(-numbers // use.world)


def bucket_bytes(use: ZeroSettings) -> int:
    """One buffer for every dtype that gradients travel in; stages 1 and 2 fill it in float32."""
    widths = use.dtypes if use.stage == 3 else (FLOAT32,) * len(use.dtypes)
    return use.bucket * sum(widths)


def lower_copy(weights: Weights, use: ZeroSettings) -> int:
    """What travels in a lower precision is copied once more."""
    return sum(w for w in use.dtypes if w < FLOAT32) * min(use.bucket, weights.trained)


def flat_update(weights: Weights, use: ZeroSettings, device: Device) -> int:
    """The flat gradient of a group, and what the optimizer makes of it."""
    largest = -(-max(weights.groups) // use.world)
    return FLOAT32 * largest + roots(largest, device)


def roots(numbers: int, device: Device) -> int:
    """AdamW's square roots; on a GPU its kernel is fused."""
    return FLOAT32 * numbers if device == "cpu" else 0

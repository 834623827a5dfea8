"""Run by test_engine.py in a process of its own: DeepSpeed keeps global state.

Prints one JSON document: what every ZeRO stage, place and optimizer does with the same tiny module.
"""

import importlib.util
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from asymlift.maths.muon import adamw_scale, orthogonalize
from asymlift.model.footprint import LiveBytes
from asymlift.runtime import dist
from asymlift.runtime.engine import Engine, EngineSettings, Offload
from asymlift.runtime.optimizers import Kind, OptimizerSettings
from asymlift.runtime.parameters import Trainable, local_shard

# Small models stay whole under ZeRO-3 unless these are 0, and that hides bugs.
STRICT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


@dataclass(frozen=True)
class Case:
    stage: int
    kind: Kind = "adamw"
    offload: Offload = "none"
    zero3: dict[str, int] = field(default_factory=dict)
    autocast: torch.dtype | None = None


CASES = {
    "0": Case(0),
    "1": Case(1),
    "2": Case(2),
    "3": Case(3, zero3=STRICT),
    "3 persistent": Case(3),
    "1, optimizer offloaded": Case(1, offload="optimizer"),
    "2, optimizer offloaded": Case(2, offload="optimizer"),
    "3, optimizer offloaded": Case(3, offload="optimizer", zero3=STRICT),
    "3, all offloaded": Case(3, offload="all", zero3=STRICT),
    "3 persistent, all offloaded": Case(3, offload="all"),
    "0, muon": Case(0, "muon"),
    "1, muon": Case(1, "muon"),
    "2, muon, optimizer offloaded": Case(2, "muon", "optimizer"),
    "3, muon": Case(3, "muon", zero3=STRICT),
    "3, muon, all offloaded": Case(3, "muon", "all", STRICT),
}
EIGHT_BIT = {
    "0, 8 bit": Case(0, "adamw_8bit"),
    "1, 8 bit": Case(1, "adamw_8bit"),
    "2, 8 bit": Case(2, "adamw_8bit"),
    "3, 8 bit": Case(3, "adamw_8bit", zero3=STRICT),
}
# What is cut differently when there are two ranks; their odd shapes leave padding.
OF_TWO_RANKS = [
    "0",
    "1",
    "2, optimizer offloaded",
    "3",
    "3 persistent, all offloaded",
    "0, muon",
    "2, muon, optimizer offloaded",
    "3, muon, all offloaded",
    "1, 8 bit",
    "3, 8 bit",
]
# Between these the state goes and comes; with another number of ranks too.
CROSSED = {
    "adamw": ["0", "1", "2, optimizer offloaded", "3", "3, all offloaded"],
    "muon": ["0, muon", "1, muon", "3, muon"],
}
HAS_8_BIT = importlib.util.find_spec("bitsandbytes") is not None
RATES = {"first": 0.01, "lora": 0.03, "last": 0.002}
BETAS, EPS, DECAY, CLIP, MOMENTUM = (0.9, 0.95), 1e-8, 0.1, 0.5, 0.9
MATRICES = {"lora.weight", "first.weight"}


class Tiny(nn.Module):
    """Three groups of parameters, declared in another order than they train, one frozen."""

    def __init__(self, seed: int, width: int = 5) -> None:
        super().__init__()
        self.last = nn.Linear(7, 3)
        self.frozen = nn.Linear(width, width)
        self.first = nn.Linear(6, width)
        self.scale = nn.Parameter(torch.ones(1))
        self.lora = nn.Linear(width, 7, bias=False)
        self.frozen.requires_grad_(False)
        for trains in (False, True):  # what is frozen does not depend on the seed
            g = torch.Generator().manual_seed(seed if trains else 0)
            for p in self.parameters():
                if p.requires_grad is trains:
                    p.data.copy_(torch.randn(p.shape, generator=g) * (5 / width) ** 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.last(torch.tanh(self.lora(torch.tanh(self.frozen(self.first(x)))) * self.scale))
        loss = (y - x[:, :3]).square().mean()
        return loss, {"size": y.detach().square().mean()}


def trainable_of(module: Tiny) -> Trainable:
    order = ["first.weight", "lora.weight", "last.weight", "first.bias", "scale", "last.bias"]
    named = dict(module.named_parameters())
    roles = {name: "lora" if name == "scale" else name.partition(".")[0] for name in order}
    return Trainable({name: named[name] for name in order}, roles, matrices=set(MATRICES))


def batch(number: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 + number))


def optimizer_of(kind: Kind) -> OptimizerSettings:
    return OptimizerSettings(kind, BETAS, EPS, DECAY, MOMENTUM)


def width_of(kind: Kind) -> int:
    """Small tensors have moments of 32 bits."""
    return 1401 if kind == "adamw_8bit" else 5


def engine_for(case: Case, seed: int, width: int = 0) -> Engine:
    module = Tiny(seed, width or width_of(case.kind))
    settings = EngineSettings(
        case.stage, case.offload, 4, 2, optimizer_of(case.kind), case.autocast, case.zero3
    )
    return Engine(module, trainable_of(module), settings, dist.discover())


def update(engine: Engine, number: int, clip: float, rates: dict[str, float]) -> float:
    """Two micro-batches and a step."""
    engine.forward_backward(batch(2 * number), 1.0)
    engine.micro_step_done()
    engine.forward_backward(batch(2 * number + 1), 1.0)
    return engine.update(rates, clip)


def rates_at(number: int) -> dict[str, float]:
    return {role: rate * (1 + number) for role, rate in RATES.items()}


def plain(kind: Kind, clips: list[float]) -> dict[str, Any]:
    """The same by torch alone; AdamW of 32 bits stands for that of 8."""
    module = Tiny(0, width_of(kind))
    trainable = trainable_of(module)
    matrices = MATRICES if kind == "muon" else set()
    roles = trainable.roles
    groups = [
        {"params": [trainable.parameters[n] for n in roles if roles[n] == r and n not in matrices]}
        for r in RATES
    ]
    adamw = torch.optim.AdamW(groups, lr=0, betas=BETAS, eps=EPS, weight_decay=DECAY)
    momentum = {n: torch.zeros_like(trainable.parameters[n]) for n in roles if n in matrices}
    norms = []
    for number, clip in enumerate(clips):
        module.zero_grad()
        for part in range(2):
            (module(batch(2 * number + part))[0] / 2).backward()
        rates = rates_at(number)
        for group, rate in zip(adamw.param_groups, rates.values(), strict=True):
            group["lr"] = rate
        limit = clip if clip else float("inf")
        norms.append(float(nn.utils.clip_grad_norm_(trainable.parameters.values(), limit)))
        adamw.step()
        for name, average in momentum.items():
            muon_by_hand(trainable.parameters[name], average, rates[roles[name]])
    weights = {n: p.detach().clone() for n, p in trainable.parameters.items()}
    moments = {
        f"{key}/{n}": adamw.state[p][key].clone()
        for n, p in trainable.parameters.items()
        for key in ("exp_avg", "exp_avg_sq")
        if n not in matrices
    }
    moments |= {f"momentum/{n}": average.clone() for n, average in momentum.items()}
    return {"norms": norms, "weights": weights, "moments": moments}


@torch.no_grad()
def muon_by_hand(weight: nn.Parameter, average: Tensor, rate: float) -> None:
    assert weight.grad is not None
    average.copy_(MOMENTUM * average + (1 - MOMENTUM) * weight.grad)
    ahead = MOMENTUM * average + (1 - MOMENTUM) * weight.grad
    weight.mul_(1 - rate * DECAY)
    weight.sub_(rate * adamw_scale(*weight.shape) * orthogonalize(ahead))


def snapshot(tensors: Callable[[], Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors()}


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference; infinite where names or shapes differ."""
    if set(one) != set(other) or any(one[n].shape != other[n].shape for n in one):
        return float("inf")
    return max(
        float((one[n].double() - other[n].double()).abs().max() / other[n].abs().max()) for n in one
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the last bit."""
    return set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)


def loss_of(engine: Engine) -> float:
    with torch.no_grad():
        return float(engine.inner(batch(99))[0])


class Reader:
    """Reads copies of stretches, counts their numbers, and fails if one is still held."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.numbers = tensors, 0
        self.last: weakref.ref[Tensor] | None = None

    def __call__(self, name: str, stretch: slice) -> Tensor:
        assert self.last is None or self.last() is None, f"{name}: one too many"
        tensor = self.tensors[name].flatten()[stretch].clone()
        assert len(tensor) == stretch.stop - stretch.start
        self.numbers += len(tensor)
        self.last = weakref.ref(tensor)
        return tensor

    @property
    def share(self) -> float:
        return self.numbers / sum(tensor.numel() for tensor in self.tensors.values())


def shards_of(engine: Engine, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    shards = {
        name: torch.empty_like(local_shard(engine.trainable.parameters[name])) for name in tensors
    }
    for name, shard in shards.items():
        engine.fill_shard(name, shard, Reader(tensors))
    return shards


class Unreadable(dict[str, Tensor]):
    """Fails at the last of them, when the others have been read."""

    def __getitem__(self, name: str) -> Tensor:
        if name == list(self)[-1]:
            raise RuntimeError
        return super().__getitem__(name)


def copies(engine: Engine, shards: dict[str, Tensor]) -> float:
    """The most that showing takes beside what is there, over the largest tensor of this rank."""
    held = [local_shard(parameter) for parameter in engine.trainable.parameters.values()]
    with LiveBytes() as live:
        live.ignore([*held, *engine.trainable.parameters.values(), *shards.values()])
        with engine.showing(shards):
            pass
    return live.peak / max(-(-tensor.nbytes // live.block) * live.block for tensor in held)


def shared_out(engine: Engine, other: dict[str, Tensor]) -> bool:
    """Where each rank holds some of the tensors to show; and what an error leaves to its rank."""
    world, rank = engine.ranks.world, engine.ranks.rank
    owners = {name: number % world for number, name in enumerate(other)}
    mine = {name: other[name].clone() for name in other if owners[name] == rank}
    weights = snapshot(engine.weights)
    with engine.showing(mine, owners):
        shown = same(snapshot(engine.weights), other)
    back = same(snapshot(engine.weights), weights)
    try:
        with engine.showing(mine, owners):
            raise RuntimeError
    except RuntimeError:
        now = snapshot(engine.weights)
        held = all(torch.equal(now[n], (weights if n in mine else other)[n]) for n in now)
    return shown and back and held and all(torch.equal(mine[n], other[n]) for n in mine)


def check(case: Case) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    width = width_of(case.kind)
    engine = engine_for(case, seed=0)
    facts["about"] = engine.about
    facts["updates at first"] = engine.num_updates
    facts["moments at first"] = max(float(m.abs().max()) for _, m in engine.moments())
    facts["shapes"] = {name: list(engine.shape_of(name)) for name in engine.trainable.parameters}
    given = snapshot(engine.weights)
    start = {n: p.detach() for n, p in trainable_of(Tiny(0, width)).parameters.items()}
    facts["count"] = engine.trainable.num_parameters == sum(p.numel() for p in start.values())
    facts["begins with its weights"] = same(given, start)

    torch_alone = plain(case.kind, [CLIP] * 3)
    norms = [update(engine, number, CLIP, rates_at(number)) for number in range(3)]
    weights, moments = snapshot(engine.weights), snapshot(engine.moments)
    facts["norms"], facts["norms of torch"] = norms, torch_alone["norms"]
    facts["weights against torch"] = worst(weights, torch_alone["weights"])
    facts["moments against torch"] = worst(moments, torch_alone["moments"])
    facts["updates"] = engine.num_updates

    # whole and shard are inverses of each other
    back = {n: engine.whole(n, shard) for n, shard in shards_of(engine, weights).items()}
    facts["shards"] = same(back, weights)

    # other weights in, and out again
    stranger = Tiny(5, width)
    other = {n: p.detach() for n, p in trainable_of(stranger).parameters.items()}
    loss = loss_of(engine)
    shards = shards_of(engine, other)
    kept = {name: shard.clone() for name, shard in shards.items()}
    facts["copies of the largest"] = copies(engine, shards)
    with engine.showing(shards):
        facts["shown"] = loss_of(engine) == stranger(batch(99))[0].item()
        facts["shown weights"] = same(snapshot(engine.weights), other)
    facts["loss afterwards"] = loss_of(engine) == loss
    facts["weights afterwards"] = same(snapshot(engine.weights), weights)
    facts["moments afterwards"] = same(snapshot(engine.moments), moments)
    facts["shards afterwards"] = same(shards, kept)
    for where in ("before", "inside"):
        try:
            with engine.showing(Unreadable(shards) if where == "before" else shards):
                raise RuntimeError
        except RuntimeError:
            weights_back, shards_back = same(snapshot(engine.weights), weights), same(shards, kept)
            facts[f"after an error {where}"] = weights_back and shards_back
    facts["shared out"] = case.stage == 3 or shared_out(engine, other)
    engine.set_weights(Reader(weights))  # wholes beside shards are not put back
    with engine.showing({}):
        facts["showing nothing"] = loss_of(engine) == loss

    # the state in another engine, which began elsewhere, goes on as this one does
    twin = engine_for(case, seed=3)
    readers = Reader(weights), Reader(moments)
    twin.set_weights(readers[0])
    twin.set_moments(readers[1], 3)
    facts["read"] = [reader.share for reader in readers]
    facts["restored weights"] = same(snapshot(twin.weights), weights)
    facts["restored moments"] = same(snapshot(twin.moments), moments)
    facts["restored updates"] = twin.num_updates
    facts["restored loss"] = loss_of(twin) == loss
    norms, again = (
        [update(goes_on, number, 0.0, rates_at(number)) for number in (3, 4)]
        for goes_on in (engine, twin)
    )
    facts["goes on alike"] = same(snapshot(twin.weights), snapshot(engine.weights)) and same(
        snapshot(twin.moments), snapshot(engine.moments)
    )
    torch_alone = plain(case.kind, [CLIP] * 3 + [0.0] * 2)
    facts["norms that go on alike"] = norms == again
    facts["unclipped norms"], facts["unclipped norms of torch"] = norms, torch_alone["norms"][3:]
    facts["weights against torch, unclipped"] = worst(
        snapshot(engine.weights), torch_alone["weights"]
    )

    # an update that is not finite
    before, remembered = snapshot(engine.weights), snapshot(engine.moments)
    engine.forward_backward(batch(0), float("nan"))
    engine.micro_step_done()
    engine.forward_backward(batch(1), 1.0)
    norm = engine.update(rates_at(0), CLIP)
    facts["nan norm"] = str(norm)
    facts["nan left out"] = same(snapshot(engine.weights), before) and same(
        snapshot(engine.moments), remembered
    )
    facts["skipped"], facts["updates after nan"] = engine.num_skipped, engine.num_updates
    return facts


def cross(cases: dict[str, Case]) -> dict[str, bool]:
    """The state of one case set in every other one goes on there to the last bit."""
    found: dict[str, bool] = {}
    states: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    ends: dict[str, dict[str, Tensor]] = {}
    engines = {name: engine_for(case, seed=0) for name, case in cases.items()}
    for number, (name, engine) in enumerate(engines.items()):
        update(engine, number, 0.0, rates_at(0))
        states[name] = snapshot(engine.weights), snapshot(engine.moments)
        update(engine, 8, 0.0, rates_at(1))
        ends[name] = snapshot(engine.weights)
    for source, (weights, moments) in states.items():
        for target, engine in engines.items():
            engine.set_weights(Reader(weights))
            engine.set_moments(Reader(moments), 1)
            read = same(snapshot(engine.weights), weights) and same(
                snapshot(engine.moments), moments
            )
            update(engine, 8, 0.0, rates_at(1))
            found[f"{source} -> {target}"] = (
                read and engine.num_updates == 2 and same(snapshot(engine.weights), ends[source])
            )
    return found


def converted() -> dict[str, float]:
    """How far moments of 32 bits move when they are stored in 8, and back."""
    full = engine_for(Case(1), seed=0, width=width_of("adamw_8bit"))
    small = engine_for(Case(1, "adamw_8bit"), seed=0)
    update(full, 0, 0.0, rates_at(0))
    moments = snapshot(full.moments)
    small.set_moments(Reader(moments), 1)
    stored = snapshot(small.moments)
    full.set_moments(Reader(stored), 1)
    return {
        "stored": worst(stored, moments),
        "back": worst(snapshot(full.moments), stored),
        "updates": small.num_updates,
    }


def exchanged(stage: int) -> bool:
    """In a run in bf16: weights change places with float32 only if they are float32 too."""
    engine = engine_for(Case(stage, zero3=STRICT if stage == 3 else {}, autocast=torch.bfloat16), 0)
    shards = {n: local_shard(p).float().clone() for n, p in engine.trainable.parameters.items()}
    given = snapshot(engine.weights)
    update(engine, 0, 0.0, rates_at(0))
    moved = snapshot(engine.weights)
    with engine.showing(shards):
        shown = same(snapshot(engine.weights), given)
    return shown and same(snapshot(engine.weights), moved) and not same(moved, given)


def available(names: list[str]) -> dict[str, Case]:
    cases = CASES | (EIGHT_BIT if HAS_8_BIT else {})
    return {name: cases[name] for name in names if name in cases}


def everything() -> dict[str, Any]:
    ranks = dist.discover()
    dist.join(ranks, torch.device("cpu"), timeout=60)
    dist.join(ranks, torch.device("cpu"), timeout=60)  # again: nothing happens
    alone = ranks.world == 1
    cases = available([*CASES, *EIGHT_BIT] if alone else OF_TWO_RANKS)
    facts: dict[str, Any] = {name: check(case) for name, case in cases.items()}
    facts["cross"] = {kind: cross(available(names)) for kind, names in CROSSED.items()}
    facts["converted"] = converted() if alone and HAS_8_BIT else None
    facts["exchanged in bf16"] = [exchanged(stage) for stage in range(4)]
    values = torch.tensor([1.0, 2.0])
    facts["dist"] = {
        "summed": dist.summed(values).tolist(),
        "from first": dist.first_does(ranks, lambda: "x"),
        "barrier": dist.barrier(),
    }
    return facts


if __name__ == "__main__":
    json.dump(everything(), sys.stdout)

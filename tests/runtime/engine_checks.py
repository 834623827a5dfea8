"""Run by test_engine.py in a process of its own: DeepSpeed keeps global state.

Prints one JSON document: what every ZeRO stage does with the same tiny module.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from asymlift.runtime import dist
from asymlift.runtime.engine import Engine, EngineSettings
from asymlift.runtime.parameters import Trainable, local_shard

# Small models stay whole under ZeRO-3 unless these are 0, and that hides bugs.
STRICT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
CASES: dict[str, tuple[int, dict[str, int]]] = {
    "0": (0, {}),
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, STRICT),
    "3 persistent": (3, {}),
}
RATES = {"first": 0.01, "lora": 0.03, "last": 0.002}
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 0.5


class Tiny(nn.Module):
    """Three groups of parameters, declared in another order than they train, one frozen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.last = nn.Linear(7, 3)
        self.frozen = nn.Linear(5, 5)
        self.first = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.lora = nn.Linear(5, 7, bias=False)
        self.frozen.requires_grad_(False)
        for trains in (False, True):  # what is frozen does not depend on the seed
            g = torch.Generator().manual_seed(seed if trains else 0)
            for p in self.parameters():
                if p.requires_grad is trains:
                    p.data.copy_(torch.randn(p.shape, generator=g))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.last(torch.tanh(self.lora(torch.tanh(self.frozen(self.first(x)))) * self.scale))
        loss = (y - x[:, :3]).square().mean()
        return loss, {"size": y.detach().square().mean()}


def trainable_of(module: Tiny) -> Trainable:
    order = ["first.weight", "lora.weight", "last.weight", "first.bias", "scale", "last.bias"]
    named = dict(module.named_parameters())
    roles = {name: "lora" if name == "scale" else name.partition(".")[0] for name in order}
    return Trainable({name: named[name] for name in order}, roles)


def batch(number: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(100 + number))


def engine_for(case: str, seed: int) -> Engine:
    stage, zero3 = CASES[case]
    settings = EngineSettings(stage, 4, 2, BETAS, EPS, DECAY, None, zero3)
    module = Tiny(seed)
    return Engine(module, trainable_of(module), settings, dist.discover())


def update(engine: Engine, number: int, clip: float, rates: dict[str, float]) -> float:
    """Two micro-batches and a step."""
    engine.forward_backward(batch(2 * number), 1.0)
    engine.micro_step_done()
    engine.forward_backward(batch(2 * number + 1), 1.0)
    return engine.update(rates, clip)


def rates_at(number: int) -> dict[str, float]:
    return {role: rate * (1 + number) for role, rate in RATES.items()}


def plain(clips: list[float]) -> dict[str, Any]:
    """The same by torch alone."""
    module = Tiny(0)
    trainable = trainable_of(module)
    groups = [
        {"params": [p for n, p in trainable.parameters.items() if trainable.roles[n] == role]}
        for role in RATES
    ]
    adamw = torch.optim.AdamW(groups, lr=0, betas=BETAS, eps=EPS, weight_decay=DECAY)
    norms = []
    for number, clip in enumerate(clips):
        adamw.zero_grad()
        for part in range(2):
            (module(batch(2 * number + part))[0] / 2).backward()
        for group, rate in zip(adamw.param_groups, rates_at(number).values(), strict=True):
            group["lr"] = rate
        parameters = list(trainable.parameters.values())
        limit = clip if clip else float("inf")
        norms.append(float(nn.utils.clip_grad_norm_(parameters, limit)))
        adamw.step()
    weights = {n: p.detach().clone() for n, p in trainable.parameters.items()}
    moments = {
        f"{key}/{n}": adamw.state[p][key].clone()
        for n, p in trainable.parameters.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {"norms": norms, "weights": weights, "moments": moments}


def snapshot(tensors: Callable[[], Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors()}


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference; infinite where names, shapes or order differ."""
    if list(one) != list(other) or any(one[n].shape != other[n].shape for n in one):
        return float("inf")
    return max(
        float((one[n].double() - other[n].double()).abs().max() / other[n].abs().max()) for n in one
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the last bit."""
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


def loss_of(engine: Engine) -> float:
    with torch.no_grad():
        return float(engine.inner(batch(99))[0])


def check(case: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    engine = engine_for(case, seed=0)
    facts["updates at first"] = engine.num_updates
    facts["moments at first"] = max(float(m.abs().max()) for _, m in engine.moments())
    facts["shapes"] = {name: list(engine.shape_of(name)) for name in engine.trainable.parameters}
    facts["count"] = engine.trainable.num_parameters
    given = snapshot(engine.weights)
    start = {n: p.detach() for n, p in trainable_of(Tiny(0)).parameters.items()}
    facts["begins with its weights"] = same(given, start)

    torch_alone = plain([CLIP] * 3)
    norms = [update(engine, number, CLIP, rates_at(number)) for number in range(3)]
    weights, moments = snapshot(engine.weights), snapshot(engine.moments)
    facts["norms"], facts["norms of torch"] = norms, torch_alone["norms"]
    facts["weights against torch"] = worst(weights, torch_alone["weights"])
    facts["moments against torch"] = worst(moments, torch_alone["moments"])
    facts["updates"] = engine.num_updates

    # whole and shard are inverses of each other
    facts["shards"] = all(
        torch.equal(engine.whole(n, engine.shard(n, w)), w)
        and torch.equal(engine.shard(n, w), local_shard(engine.trainable.parameters[n]))
        for n, w in weights.items()
    )

    # other weights in, and out again
    other = {n: p.detach() for n, p in trainable_of(Tiny(5)).parameters.items()}
    loss = loss_of(engine)
    stranger = Tiny(0)
    named = dict(stranger.named_parameters())
    for name, value in other.items():
        named[name].data.copy_(value)
    shards = {name: engine.shard(name, value) for name, value in other.items()}
    with engine.showing(shards):
        facts["shown"] = loss_of(engine) == stranger(batch(99))[0].item()
        facts["shown weights"] = same(snapshot(engine.weights), other)
    facts["loss afterwards"] = loss_of(engine) == loss
    facts["weights afterwards"] = same(snapshot(engine.weights), weights)
    facts["moments afterwards"] = same(snapshot(engine.moments), moments)
    try:
        with engine.showing(shards):
            raise RuntimeError
    except RuntimeError:
        facts["weights after an error"] = same(snapshot(engine.weights), weights)
    with engine.showing({}):
        facts["showing nothing"] = loss_of(engine) == loss

    # the state in another engine, which began elsewhere, goes on as this one does
    twin = engine_for(case, seed=3)
    update(twin, 50, 0.0, dict.fromkeys(RATES, 0.0))
    twin.set_weights(weights)
    twin.set_moments(moments, 3)
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
    torch_alone = plain([CLIP] * 3 + [0.0] * 2)
    facts["norms that go on alike"] = norms == again
    facts["unclipped norms"], facts["unclipped norms of torch"] = norms, torch_alone["norms"][3:]
    facts["weights against torch, unclipped"] = worst(
        snapshot(engine.weights), torch_alone["weights"]
    )

    # an update that is not finite
    before = snapshot(engine.weights)
    engine.forward_backward(batch(0), float("nan"))
    engine.micro_step_done()
    engine.forward_backward(batch(1), 1.0)
    norm = engine.update(rates_at(0), CLIP)
    facts["nan norm"] = str(norm)
    facts["nan left out"] = same(snapshot(engine.weights), before)
    facts["skipped"], facts["updates after nan"] = engine.num_skipped, engine.num_updates
    return facts


def cross() -> dict[str, bool]:
    """The state of one stage set in every other one, read back to the last bit."""
    found: dict[str, bool] = {}
    states: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    engines = {case: engine_for(case, seed=0) for case in ("0", "1", "3")}
    for number, (case, engine) in enumerate(engines.items()):
        update(engine, number, 0.0, rates_at(0))
        states[case] = snapshot(engine.weights), snapshot(engine.moments)
    for source, (weights, moments) in states.items():
        for target, engine in engines.items():
            engine.set_weights(weights)
            engine.set_moments(moments, 7)
            found[f"{source} -> {target}"] = (
                same(snapshot(engine.weights), weights)
                and same(snapshot(engine.moments), moments)
                and engine.num_updates == 7
            )
    return found


def everything() -> dict[str, Any]:
    ranks = dist.discover()
    dist.join(ranks, torch.device("cpu"), timeout=60)
    dist.join(ranks, torch.device("cpu"), timeout=60)  # again: nothing happens
    facts: dict[str, Any] = {case: check(case) for case in CASES}
    facts["cross"] = cross()
    values = torch.tensor([1.0, 2.0])
    facts["dist"] = {
        "summed": dist.summed(values).tolist(),
        "from first": dist.first_does(ranks, lambda: "x"),
        "barrier": dist.barrier(),
    }
    return facts


if __name__ == "__main__":
    json.dump(everything(), sys.stdout)

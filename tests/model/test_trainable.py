"""What a recipe says trains, and nothing else, in float32 and under its own name."""

import math

import pytest
import torch

from asymlift.errors import BadRecipe
from asymlift.families import FAMILIES
from asymlift.families.base import matching_modules, trained_in_full
from asymlift.model.reference import Twin
from asymlift.model.trainable import (
    Adapters,
    plain_name,
    repeated_blocks,
    train_everything,
    train_parts,
)
from tests.families.case import case_of
from tests.tiny import KINDS, lifted_pair, tiny_transformer

ROLES = ["first", "last", "final_norm"]


def lora(*targets: str, rank: int = 3, dropout: float = 0.5) -> Adapters:
    return Adapters(rank=rank, alpha=2.0 * rank, dropout=dropout, targets=targets)


def parts(net, name, *, adapters=None, modules=(), keep_originals=True, seed=0):
    return train_parts(
        net,
        FAMILIES[name],
        adapters=adapters,
        modules=list(modules),
        keep_originals=keep_originals,
        seed=seed,
    )


def as_published(net, name, *, keep_originals=True, seed=0):
    adapters = lora(*FAMILIES[name].lora_targets)
    return parts(
        net, name, adapters=adapters, modules=ROLES, keep_originals=keep_originals, seed=seed
    )


@pytest.mark.parametrize("keep_originals", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_exactly_the_named_parts_train_under_the_names_of_the_plain_state_dict(
    name, keep_originals
):
    family, plain = FAMILIES[name], tiny_transformer(name)
    net = tiny_transformer(name)
    trainable = as_published(net, name, keep_originals=keep_originals)

    targets = matching_modules(plain, family.lora_targets)
    whole = trained_in_full(family)
    expected = {
        f"{path}.{part}.weight": "lora" for path in targets for part in ("lora_A", "lora_B")
    }
    for role, path in whole.items():
        for key in plain.get_submodule(path).state_dict():
            expected[f"{path}.{key}"] = role
    assert trainable.roles == expected
    assert trainable.parameters.keys() == expected.keys()
    assert trainable.adapted == targets
    assert trainable.num_parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)

    stored = plain.state_dict()
    for key, role in expected.items():
        parameter = trainable.parameters[key]
        if role != "lora":
            assert torch.equal(parameter, stored[key]), key
    for path in targets:
        width_out, width_in = stored[f"{path}.weight"].shape
        assert trainable.parameters[f"{path}.lora_A.weight"].shape == (3, width_in)
        assert trainable.parameters[f"{path}.lora_B.weight"].shape == (width_out, 3)
    assert sum(isinstance(m, Twin) for m in net.modules()) == (len(whole) if keep_originals else 0)


@pytest.mark.parametrize("name", KINDS)
def test_what_trains_is_float32_and_everything_else_keeps_its_dtype(name):
    net = tiny_transformer(name).to(torch.bfloat16)
    frozen_float32 = next(path for path, _ in net.named_parameters() if "norm" in path)
    net.get_parameter(frozen_float32).data = net.get_parameter(frozen_float32).data.float()
    stored = {path: p.clone() for path, p in net.state_dict().items()}

    trainable = as_published(net, name)

    assert {p.dtype for p in trainable.parameters.values()} == {torch.float32}
    seen = set()
    for path, p in net.named_parameters():
        plain = plain_name(path).replace(".original.", ".")
        if p.requires_grad:
            assert id(p) == id(trainable.parameters[plain])
        elif ".original." in path:
            assert p.dtype == torch.float32 and torch.equal(p, stored[plain].float())
        else:
            assert p.dtype == stored[plain].dtype and torch.equal(p, stored[plain]), path
            seen.add(plain)
    assert frozen_float32 in seen


@pytest.mark.parametrize("name", KINDS)
def test_nothing_has_changed_before_the_first_step(name):
    pair = lifted_pair(name, dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, math.prod(pair.grid), pair.geometry.D, generator=g)
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        before = pair.pixel(x_t, sigma, pair.text, pair.grid, floor=1e-4)
        as_published(pair.pixel.net, name)
        assert torch.equal(pair.pixel(x_t, sigma, pair.text, pair.grid, floor=1e-4), before)


def test_adapters_begin_gaussian_and_zero_and_follow_the_seed():
    def made(seed: int) -> dict[str, torch.Tensor]:
        adapters = lora(*FAMILIES["flux2"].lora_targets, rank=16)
        net = tiny_transformer("flux2")
        state = torch.random.get_rng_state()
        trainable = parts(net, "flux2", adapters=adapters, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's draws move
        return trainable.parameters

    first, again, other = made(5), made(5), made(6)
    for name, p in first.items():
        assert torch.equal(p, again[name]), name
        if name.endswith(".lora_B.weight"):
            assert not p.any(), name
        else:
            assert not torch.equal(p, other[name]), name
    values = torch.cat([p.detach().flatten() for n, p in first.items() if ".lora_A." in n]) * 16
    assert abs(float(values.mean())) < 0.03 and abs(float(values.std()) - 1) < 0.03  # std 1 / rank
    kurtosis = float((values**4).mean() / (values**2).mean() ** 2)
    assert abs(kurtosis - 3) < 0.2  # uniform would be 1.8


def test_the_adapters_effect_is_alpha_over_rank():
    net = tiny_transformer("flux2")
    path = "single_transformer_blocks.1.attn.to_out"
    weight = net.get_submodule(path).weight.detach().clone()
    trainable = parts(net, "flux2", adapters=Adapters(2, 7.0, 0.0, (path,)))
    down, up = trainable.parameters.values()
    up.data.normal_()
    x = torch.randn(4, weight.shape[1])
    torch.testing.assert_close(
        net.get_submodule(path)(x), x @ weight.T + 3.5 * x @ down.T @ up.T, rtol=1e-5, atol=1e-4
    )


def test_dropout_is_on_in_the_adapters_and_nowhere_else():
    net = tiny_transformer("flux2").train()
    own = sum(isinstance(m, torch.nn.Dropout) for m in net.modules())
    trainable = as_published(net, "flux2")
    dropouts = {p: m for p, m in net.named_modules() if isinstance(m, torch.nn.Dropout)}
    active = {path: m.p for path, m in dropouts.items() if m.training}
    assert active == {f"{path}.lora_dropout.default": 0.5 for path in trainable.adapted}
    assert len(dropouts) == own + len(active) and own > 0


def test_a_target_is_a_whole_path_and_no_suffix():
    """As a list, peft would put adapters on every path that ends like this."""
    sd3 = tiny_transformer("sd3")
    sd3.transformer_blocks[0].proj_out = torch.nn.Linear(4, 4)
    trainable = parts(sd3, "sd3", adapters=lora("proj_out"))
    assert list(trainable.parameters) == ["proj_out.lora_A.weight", "proj_out.lora_B.weight"]
    assert trainable.adapted == ["proj_out"]


def test_a_dot_in_a_target_is_a_dot():
    net = tiny_transformer("sd3")
    net.transformer_blocks[0].attn.to_outX0 = torch.nn.Linear(4, 4)
    trainable = parts(net, "sd3", adapters=lora("transformer_blocks.0.attn.to_out.0"))
    assert trainable.adapted == ["transformer_blocks.0.attn.to_out.0"]
    assert len(trainable.parameters) == 2


def test_a_module_can_be_named_by_its_own_path():
    net = tiny_transformer("flux2")
    trainable = parts(net, "flux2", modules=["norm_out", "last", "transformer_blocks.1"])
    assert set(trainable.roles.values()) == {"norm_out", "last", "transformer_blocks.1"}
    assert trainable.roles["norm_out.linear.weight"] == "norm_out"
    inside = [n for n, role in trainable.roles.items() if role == "transformer_blocks.1"]
    assert inside == [
        f"transformer_blocks.1.{n}" for n in net.transformer_blocks[1].trained.state_dict()
    ]


def test_a_module_whose_path_begins_alike_is_another():
    net = tiny_transformer("flux2")
    net.proj_out2 = torch.nn.Linear(3, 3)
    trainable = parts(net, "flux2", modules=["last"], adapters=lora("proj_out2"))
    assert trainable.roles["proj_out2.lora_A.weight"] == "lora"
    assert trainable.roles["proj_out.weight"] == "last"


@pytest.mark.parametrize(
    "modules, target, message",
    [
        (
            ["last"],
            "proj_out",
            "finetune.train: `proj_out` would train twice, as a LoRA target and inside "
            "`proj_out`; take it out of lora.targets or modules",
        ),
        (["transformer_blocks.0"], "transformer_blocks.*.ff.linear_in", "inside `transformer_bl"),
    ],
)
def test_what_would_train_twice_is_refused(modules, target, message):
    with pytest.raises(BadRecipe) as caught:
        parts(tiny_transformer("flux2"), "flux2", adapters=lora(target), modules=modules)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "modules, message",
    [
        (
            ["first", "x_embedder"],
            "finetune.train.modules: `x_embedder` would train twice, as `first` and as "
            "`x_embedder`; take one of them out",
        ),
        (["final_norm", "norm_out.linear"], "`norm_out.linear` would train twice"),
        (["norm_out.linear", "final_norm"], "`norm_out.linear` would train twice"),
    ],
)
def test_modules_inside_each_other_are_refused(modules, message):
    with pytest.raises(BadRecipe) as caught:
        parts(tiny_transformer("flux2"), "flux2", modules=modules)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "adapters, modules, message",
    [
        (
            None,
            ["norm_ouch"],
            "finetune.train.modules: `norm_ouch` is no module of Flux2Transformer2DModel; "
            "did you mean `norm_out`?",
        ),
        (
            None,
            ["12345"],
            "finetune.train.modules: `12345` is no module of Flux2Transformer2DModel",
        ),
        (
            lora("transformer_blocks.*.ff.linear_inn"),
            [],
            "no linear layer of Flux2Transformer2DModel matches "
            "'transformer_blocks.*.ff.linear_inn'; did you mean "
            "'transformer_blocks.1.ff.linear_in'?",
        ),
        (
            lora(),
            ["first"],
            "finetune.train.lora.targets: the list is empty; `lora: null` trains none",
        ),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_known_one(adapters, modules, message):
    with pytest.raises(BadRecipe) as caught:
        parts(tiny_transformer("flux2"), "flux2", adapters=adapters, modules=modules)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", KINDS)
def test_everything_trains_in_float32_under_its_own_name(name):
    net = tiny_transformer(name).to(torch.bfloat16)
    net.requires_grad_(False)
    trainable = train_everything(net)
    assert list(trainable.parameters) == [path for path, _ in net.named_parameters()]
    assert set(trainable.roles.values()) == {"trunk"} and trainable.roles.keys() == set(
        trainable.parameters
    )
    for p in trainable.parameters.values():
        assert p.dtype == torch.float32 and p.requires_grad
    assert trainable.num_parameters == sum(p.numel() for p in net.parameters())
    assert trainable.adapted == []


@pytest.mark.parametrize("name", KINDS)
def test_muon_is_for_the_matrices_of_blocks_that_train_in_full(name):
    """Not for the first and the last map, embedders, norms, biases and LoRA's factors."""
    family, net = FAMILIES[name], tiny_transformer(name)
    blocks = repeated_blocks(net)
    known = case_of(name).blocks or getattr(net, "_repeated_blocks", [])
    assert {type(block).__name__ for block in blocks.values()} == set(known)

    trainable = train_everything(net)

    shapes = {path: p.ndim for path, p in trainable.parameters.items()}
    inside = {path for path in shapes if path.startswith(tuple(f"{b}." for b in blocks))}
    assert trainable.matrices == {path for path in inside if shapes[path] == 2}
    others = tuple(trained_in_full(family).values())
    assert not any(path.startswith(others) for path in trainable.matrices)
    assert len(trainable.matrices) > 10

    assert as_published(tiny_transformer(name), name).matrices == set()


@pytest.mark.parametrize("keep_originals", [True, False])
def test_a_part_of_a_block_that_trains_in_full_is_muons_beside_adapters(keep_originals):
    net = tiny_transformer("flux2")
    trainable = parts(
        net,
        "flux2",
        adapters=lora("transformer_blocks.*.attn.to_q"),
        modules=["first", "transformer_blocks.1.ff"],
        keep_originals=keep_originals,
    )
    assert trainable.matrices == {
        "transformer_blocks.1.ff.linear_in.weight",
        "transformer_blocks.1.ff.linear_out.weight",
    }

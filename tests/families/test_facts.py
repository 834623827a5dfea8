"""What a family states about its checkpoints, held against the real classes and configs."""

import importlib
import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from asymlift.errors import BadData, BadRecipe, Unavailable
from asymlift.families import FAMILIES, find_family
from asymlift.families.base import Geometry, matching_modules, trained_in_full
from asymlift.families.flux2 import DEFAULT_STEPS
from asymlift.runtime import third_party
from tests.families.case import FOUR_LEVELS, case_of, published_net
from tests.tiny import (
    lifted_pair,
    tiny_pipeline,
    tiny_text,
    tiny_transformer,
    tiny_vae,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_checkpoints_have_the_paths_and_sizes_that_are_stated(name):
    """The class at full size, without weights: a user's checkpoint is this one."""
    family = FAMILIES[name]
    assert {published.name for published in case_of(name).published} <= {*family.checkpoints}
    for published in case_of(name).published:
        net = published_net(family.transformer, published)
        sizes = family.geometry(dict(net.config), published.vae)
        assert (sizes.d, sizes.D) == (published.d, published.D)
        assert family.sizes is None or sizes == family.sizes
        for path in family.first_maps:
            weight = net.get_submodule(path).weight
            assert weight.shape[1] * math.prod(weight.shape[2:]) >= sizes.d
        assert len(net.get_submodule(family.last).weight) >= sizes.d
        for path in trained_in_full(family).values():
            assert any(p.numel() for p in net.get_submodule(path).parameters())
        assert matching_modules(net, family.lora_targets)


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_of_the_tiny_model_and_of_its_lifted_twin_are_the_same(name):
    family, vae = FAMILIES[name], dict(tiny_vae(name).config)
    pixel = lifted_pair(name).pixel.net
    latent_sizes = family.geometry(dict(tiny_transformer(name).config), vae)
    assert latent_sizes == family.geometry(dict(pixel.config), vae) == case_of(name).sizes


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vae_of_another_model_is_refused(name):
    case, vae = case_of(name), dict(tiny_vae(name).config)
    wrong = case.sizes.channels + 1
    vae = {k: wrong if k == case.vae_channels else v for k, v in vae.items()}
    said = f"reads {case.sizes.channels} channels, but its VAE writes {wrong}"
    with pytest.raises(BadData, match=said):
        FAMILIES[name].geometry(dict(tiny_transformer(name).config), vae)


def test_a_config_that_lacks_a_size_is_named():
    with pytest.raises(BadData, match="AutoencoderKL config has no `latent_channels`"):
        FAMILIES["sd3"].geometry(
            {"patch_size": 2}, {"_class_name": "AutoencoderKL", "block_out_channels": [1]}
        )
    with pytest.raises(BadData, match="model config has no `all_patch_size`"):
        FAMILIES["zimage"].geometry({}, {})


def test_patches_that_a_family_cannot_cut_are_refused():
    vae = {"latent_channels": 16, "patch_size": [4, 4]} | FOUR_LEVELS
    with pytest.raises(BadData, match=r"patch_size is \[4, 4\]"):
        FAMILIES["flux2"].geometry({"in_channels": 128}, vae)
    with pytest.raises(BadData, match=r"are \[\(2, 1\), \(4, 1\)\]"):
        both = {"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}
        FAMILIES["zimage"].geometry(both, vae)
    with pytest.raises(BadData, match="the VAE scales down by 4, not 8"):
        FAMILIES["cogview4"].geometry({}, {"block_out_channels": [1] * 3, "latent_channels": 16})


def test_a_distilled_hunyuanimage_is_refused():
    with pytest.raises(BadData, match="only the base model's velocity can be lifted"):
        FAMILIES["hunyuanimage"].geometry({"use_meanflow": True}, {})
    with pytest.raises(BadData, match="reads no letters to draw"):  # its refiner
        FAMILIES["hunyuanimage"].geometry({"text_embed_2_dim": None}, {})


def test_a_kandinsky5_of_films_is_refused():
    geometry = FAMILIES["kandinsky5"].geometry
    with pytest.raises(BadData, match="reads a first frame too; only T2I can be lifted"):
        geometry({"visual_cond": True}, {})
    with pytest.raises(BadData, match="a token is 2 frames, but a picture is one"):
        geometry({"patch_size": [2, 2, 2]}, {})


def test_a_sana_sprint_is_refused():
    with pytest.raises(BadData, match="SANA-Sprint, whose time is an angle"):
        FAMILIES["sana"].geometry({"guidance_embeds": True}, {})


def test_more_latents_than_pixels_cannot_be_lifted():
    with pytest.raises(BadData, match="at least as many pixels"):
        Geometry(vae_factor=2, channels=16, patch=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_paths_lead_to_the_right_modules(name):
    family, net = FAMILIES[name], tiny_transformer(name)
    for path in family.first_maps:
        assert isinstance(net.get_submodule(path), (nn.Linear, nn.Conv2d))
    assert isinstance(net.get_submodule(family.last), nn.Linear)
    for word, path in trained_in_full(family).items():
        numbers = sum(p.numel() for p in net.get_submodule(path).parameters())
        assert numbers, (
            f"{word}, `{path}`, has no weights; name the module that makes them, or None"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_final_norm_steers_what_the_last_map_reads_and_no_block(name):
    """Halved, it changes what the last map reads, and no block before, unless the case says so."""
    family, case, pair = FAMILIES[name], case_of(name), lifted_pair(name)
    if family.final_norm is None:
        pytest.skip("no module with weights stands between the last block and the last map")
    net, read = pair.latent.net, {}
    blocks = [path for path, _ in net.named_modules() if path.endswith(case.last_block)]
    for path in (blocks[-1], family.last):

        def note(module: Any, given: Any, named: Any, path: str = path) -> None:
            read[path] = next(t for t in (*given, *named.values()) if isinstance(t, torch.Tensor))

        net.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    tau, num = torch.tensor([0.2, 0.9]).double(), case.grid[0] * case.grid[1]

    def seen() -> list[torch.Tensor]:
        pair.latent(torch.ones(2, num, pair.geometry.d).double(), tau, pair.text, case.grid)
        return [read[blocks[-1]], read[family.last]]

    block, last = seen()
    for parameter in net.get_submodule(family.final_norm).parameters():
        parameter.data.mul_(0.5)
    block_after, last_after = seen()
    assert not torch.allclose(last, last_after)
    assert torch.equal(block, block_after) is not bool(case.shared_modulation)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_lora_pattern_names_layers_of_the_real_class(name):
    family, net = FAMILIES[name], tiny_transformer(name)
    for pattern in family.lora_targets:
        paths = matching_modules(net, [pattern])
        assert paths and not {*family.first_maps, family.last} & set(paths)


def test_a_lora_pattern_that_names_nothing_is_refused():
    net = tiny_transformer("sd3")
    with pytest.raises(BadRecipe, match=r"no linear layer of SD3.* matches 'transformer_blocks.*'"):
        matching_modules(net, ["transformer_blocks.0.ff.net.3"])
    with pytest.raises(BadRecipe, match="did you mean 'proj_out'"):
        matching_modules(net, ["proj_ou"])
    both = matching_modules(net, ["*_embedder", "context_*", "proj_out"])
    assert both == ["context_embedder", "proj_out"]  # once each


def test_flux2_adapts_the_layers_that_were_published():
    paths = matching_modules(tiny_transformer("flux2"), FAMILIES["flux2"].lora_targets)
    ends = {path.split(".", 2)[-1] for path in paths if path[:5] != "time_"}
    assert ends == {
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_out",
    }
    assert len(paths) == 2 * 4 + 2 + 2  # two double blocks, two single ones, the time embedder
    assert not any(path.startswith("transformer_blocks") and "attn" in path for path in paths)


def test_auraflow_refuses_more_positions_than_it_learned():
    """The class itself would count from the table's other end, without a word."""
    family, net = FAMILIES["auraflow"], tiny_transformer("auraflow")  # 8 x 8 positions
    text, time = tiny_text("auraflow", 1), torch.ones(1)
    family.run(net, torch.zeros(1, 4, 16, 4), time, text)
    with pytest.raises(BadData, match="of 2 x 9 tokens, as this model knows 8 positions along"):
        family.run(net, torch.zeros(1, 4, 4, 18), time, text)


# -- the base's own time shift


def mu_of_the_pipeline(name: str, num_tokens: int, steps: int) -> float | None:
    """Ask the module that the pipeline lives in."""
    pipeline = getattr(third_party.library("diffusers"), FAMILIES[name].pipelines[0])
    return case_of(name).mu(importlib.import_module(pipeline.__module__), num_tokens, steps)


@pytest.mark.parametrize("num_tokens", [24, 1024, 4096, 9216])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_base_shift_gives_the_schedulers_levels(name, kind, num_tokens):
    config = {"use_dynamic_shifting": True, "time_shift_type": kind}
    scheduler = third_party.library("diffusers").FlowMatchEulerDiscreteScheduler(**config)
    steps = torch.linspace(1, 1 / DEFAULT_STEPS, DEFAULT_STEPS)
    mu = mu_of_the_pipeline(name, num_tokens, DEFAULT_STEPS)
    if mu is None:
        pytest.skip("the pipeline never shifts by resolution")
    scheduler.set_timesteps(sigmas=steps.tolist(), mu=mu)

    shift = FAMILIES[name].base_shift(config, num_tokens)

    torch.testing.assert_close(scheduler.sigmas[:-1], shift * steps / (1 + (shift - 1) * steps))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_static_shift_is_taken_from_the_scheduler(name):
    family, own = FAMILIES[name], case_of(name).own_shift
    assert family.base_shift({"shift": 3.0, "use_dynamic_shifting": False}, 4096) == 3 * own(4096)
    assert family.base_shift({"shift": 6.0}, 24) == 6 * own(24)


def test_the_published_scheduler_of_sana_shifts_under_another_name():
    scheduler = third_party.library("diffusers").DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(20)
    steps, shift = torch.linspace(1, 0, 21), FAMILIES["sana"].base_shift(scheduler.config, 1024)
    wanted = shift * steps / (1 + (shift - 1) * steps)
    torch.testing.assert_close(scheduler.sigmas, wanted, rtol=0, atol=1e-2)


def test_the_flux2_pipelines_default_number_of_steps_is_ours():
    diffusers = third_party.library("diffusers")
    for name in FAMILIES["flux2"].pipelines:
        call = inspect.signature(getattr(diffusers, name).__call__)
        assert call.parameters["num_inference_steps"].default == DEFAULT_STEPS


# -- text


@pytest.mark.parametrize("name", FAMILIES)
def test_its_prompts_can_be_embedded_and_the_shape_of_its_pictures_is_stated(name):
    """`convert` checks the whole model with both."""
    family, case = FAMILIES[name], case_of(name)
    assert len(family.encode_prompt(tiny_pipeline(name), family.prompts, case.length)) == 2
    assert family.why_not_grid(tiny_transformer(name).config, case.grid) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_embedded_one_by_one_as_in_a_batch(name):
    """Order and padding do not leak between samples, and the empty prompt is a prompt."""
    family, case, pipeline = FAMILIES[name], case_of(name), tiny_pipeline(name)
    prompts = ["a bee", "", "a disc"]
    together = family.encode_prompt(pipeline, prompts, case.length)
    assert prompts == ["a bee", "", "a disc"]
    for prompt, sample in zip(prompts, together, strict=True):
        (alone,) = family.encode_prompt(pipeline, [prompt], case.length)
        for key, tensor in alone.items():
            torch.testing.assert_close(sample[key], tensor)
            assert not tensor.requires_grad
    bee, _, disc = together
    assert any(
        a.shape != disc[key].shape or not torch.allclose(a, disc[key]) for key, a in bee.items()
    ), "the prompt is cut off"


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_sample_comes_out_the_same_beside_a_longer_prompt(name):
    """What pads it in the batch is hidden from the model, wherever lengths may differ."""
    pair, case = lifted_pair(name), case_of(name)
    shape = 2, case.grid[0] * case.grid[1], pair.geometry.d
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tau = torch.tensor([0.4, 0.7]).double()
    beside = pair.latent(z, tau, pair.text, case.grid)[:1]
    alone = pair.latent(z[:1], tau[:1], tiny_text(name, 1, dtype=torch.float64), case.grid)
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "lengths"), [("flux2", 12), ("sd3", 28), ("zimage", None)])
def test_padding_is_cut_only_where_the_model_cannot_see_it(name, lengths):
    samples = FAMILIES[name].encode_prompt(tiny_pipeline(name), ["a bee", "a"], 12)
    got = [sample["cap_feats" if name == "zimage" else "encoder_hidden_states"].shape[0]
           for sample in samples]  # fmt: skip
    assert got == ([7, 3] if lengths is None else [lengths, lengths])


@pytest.mark.parametrize(("name", "length"), [("flux2", 512), ("sd3", 16 + 256)])
def test_the_pipelines_own_length_is_the_default(name, length):
    (sample,) = FAMILIES[name].encode_prompt(tiny_pipeline(name), ["a bee"], None)
    assert len(sample["encoder_hidden_states"]) == length


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_prompt_is_cut_to_the_words_asked_for_and_to_the_stated_default(name):
    """From one length to another, an embedding grows by as much as `text_shapes` says."""
    family, case, pipeline = FAMILIES[name], case_of(name), tiny_pipeline(name)
    if not any(case.cuts):
        pytest.skip("no prompt is cut")
    prompt = "a bee " * 300  # at least 1200 words of any tiny tokenizer

    def sizes(length: int | None) -> tuple[dict[str, int], dict[str, int]]:
        (made,) = family.encode_prompt(pipeline, [prompt], length)
        stated = family.text_shapes(pipeline.transformer.config, length)
        return {k: len(made[k]) for k in made}, {k: stated[k][0] for k in made}

    made, stated = sizes(case.length)
    for length, cuts in zip((case.length + 16, None), case.cuts, strict=True):
        now, says = sizes(length)
        for key in made:
            if not cuts or says[key] > 1024:  # a longer prompt would take the tests too long
                assert now[key] > made[key]
                continue
            assert now[key] - made[key] == says[key] - stated[key], (
                f"`{key}` of a long prompt has {made[key]} rows for a length of {case.length}, "
                f"{now[key]} for {length}; text_shapes says {stated[key]} and {says[key]}: "
                "does encode_prompt hand on max_length? is the default the pipeline's?"
            )


def test_sd3_without_t5_says_so():
    pipeline = tiny_pipeline("sd3")
    pipeline.text_encoder_3 = None
    with pytest.raises(Unavailable, match="no T5"):
        FAMILIES["sd3"].encode_prompt(pipeline, ["a bee"], 12)


def test_collate_stacks_equal_shapes_and_keeps_ragged_ones():
    stacked = FAMILIES["flux2"].collate([{"a": torch.zeros(3, 2)}, {"a": torch.ones(3, 2)}])
    assert isinstance(stacked["a"], torch.Tensor) and stacked["a"].shape == (2, 3, 2)
    ragged = FAMILIES["zimage"].collate([{"a": torch.zeros(3, 2)}, {"a": torch.ones(4, 2)}])
    assert [len(t) for t in ragged["a"]] == [3, 4]


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        (
            "flux2",
            {"a": torch.zeros(4, 2)},
            r"`a` is \(3, 2\) in sample 0 and \(4, 2\) in sample 1",
        ),
        ("flux2", {"b": torch.zeros(3, 2)}, r"sample 0 has \['a'\], sample 1 has \['b'\]"),
        ("zimage", {"a": torch.zeros(3, 5)}, r"`a` is \(3, 2\) in sample 0 and \(3, 5\)"),
        ("zimage", {}, r"sample 1 has \[\]"),
    ],
)
def test_embeddings_of_different_models_are_refused(name, other, message):
    with pytest.raises(BadData, match=message):
        FAMILIES[name].collate([{"a": torch.zeros(3, 2)}, other])


# -- which family


def written(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two configs as they stand in a checkpoint."""
    family = FAMILIES[name]
    index = {"_class_name": family.pipelines[0], "transformer": ["diffusers", family.transformer]}
    return index, {"_class_name": family.transformer, **case_of(name).transformer}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_names_its_family(name):
    index, config = written(name)
    family = FAMILIES[name]
    assert find_family("auto", index, config) is family
    assert find_family("auto", index, {}) is family
    assert find_family(name, index, config) is family


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(BadRecipe, match=r"no family 'zimages' \(did you mean zimage\?\); known"):
        find_family("zimages", *written("flux2"))
    with pytest.raises(BadRecipe, match=r"Flux9Transformer2DModel \(did you mean Flux.*zimage"):
        find_family("auto", {}, {"_class_name": "Flux9Transformer2DModel"})
    with pytest.raises(BadRecipe, match="which it does not name"):
        find_family("auto", {}, {})


def test_a_family_that_does_not_fit_the_checkpoint_is_refused():
    with pytest.raises(BadRecipe, match=r"family is sd3, a SD3T.*but the checkpoint is a Flux2T"):
        find_family("sd3", *written("flux2"))


def test_a_family_of_ones_own_is_imported():
    ours = find_family("asymlift.families.zimage:ZIMAGE", *written("zimage"))
    assert ours is FAMILIES["zimage"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.module:ATTR", "No module named 'no_such_package'"),
        ("asymlift.families.zimage:NOTHING", "has no attribute 'NOTHING'"),
        ("asymlift.families.zimage:PATCH", "is a int, not a Family"),
        (":X", "cannot be imported"),
    ],
)
def test_a_family_that_cannot_be_imported_says_why(name, message):
    with pytest.raises(BadRecipe, match=message):
        find_family(name, {}, {})


@pytest.mark.parametrize("name", FAMILIES)
def test_the_vae_factor_is_that_of_the_real_vae(name):
    """Levels halve the picture, but for the last."""
    case = case_of(name)
    z = FAMILIES[name].encode_latents(tiny_vae(name), torch.zeros(1, 3, case.height, case.width))
    size = [case.height // case.sizes.vae_factor, case.width // case.sizes.vae_factor]
    assert list(z.shape) == [1, case.sizes.channels, *size]


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_have_the_stated_shapes(name):
    """Lengths that a prompt or a checkpoint chooses apart: of those, the most is stated."""
    family, case, pipeline = FAMILIES[name], case_of(name), tiny_pipeline(name)
    made = family.encode_prompt(pipeline, ["a cat"], case.length)[0]
    stated = family.text_shapes(pipeline.transformer.config, case.length)
    assert made.keys() == stated.keys()
    for key, tensor in made.items():
        if key in case.loose:
            assert tensor.ndim == len(stated[key])
            assert all(a <= b for a, b in zip(tensor.shape, stated[key], strict=True))
        else:
            assert tuple(tensor.shape) == stated[key]

"""What cannot be ported is refused by name and reason; what is distilled is told apart."""

import functools
import inspect
import json
import re
from typing import Any

import pytest
import torch

from asymlift.errors import BadData, BadRecipe
from asymlift.families import FAMILIES, find_family
from asymlift.families.refusals import (
    CLASSES,
    PIPELINES,
    SAME_NETWORK,
    SIGNS,
    TWINS,
    distillation_warning,
    is_distilled_name,
    is_driven_by,
    why_class_refused,
    why_folder_refused,
    why_pipeline_refused,
    why_refused,
)
from asymlift.model.loading import embed_prompts, load_pipeline
from asymlift.runtime import third_party
from tests.families.case import case_of
from tests.tiny import write_pipeline

PORTABLE = {family.transformer for family in FAMILIES.values()}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def scheduler_of(name: str) -> dict[str, Any]:
    scheduler = case_of(name).scheduler()
    return {"_class_name": type(scheduler).__name__, **scheduler.config}


# ---- classes and pipelines ---------------------------------------------------------------------


def test_every_network_of_diffusers_that_makes_something_is_judged():
    diffusers = third_party.library("diffusers")
    kinds = {
        name
        for name in dir(diffusers)
        if any(word in name for word in ("Transformer", "DiT", "UNet", "UVit", "UniDiffuser"))
        and isinstance(kind := getattr(diffusers, name), type)
        and issubclass(kind, diffusers.ModelMixin)
        and not any(word in name for word in ("ControlNetModel", "Vae", "Decoder"))
    }
    assert kinds <= CLASSES.keys() | PORTABLE
    assert CLASSES.keys() <= set(dir(diffusers))
    assert PIPELINES.keys() <= set(dir(diffusers))
    assert {sign.transformer for sign in SIGNS} <= set(dir(diffusers))


@functools.cache
def pipelines_of_families() -> dict[str, set[str]]:
    """Of all pipelines of diffusers those whose transformer is of a family's class: that class."""
    diffusers, found = third_party.library("diffusers"), {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if not isinstance(kind, type) or kind is diffusers.ModularPipeline:
            continue
        if issubclass(kind, diffusers.ModularPipeline):
            parts = kind()._component_specs.values()
            said = " ".join(getattr(part.type_hint, "__name__", "") for part in parts)
        elif issubclass(kind, diffusers.DiffusionPipeline):
            said = str(inspect.signature(kind.__init__))
        else:
            continue
        if classes := PORTABLE & set(re.findall(r"\w+", said)):
            found[name] = classes
    return found


def test_every_pipeline_around_the_transformer_of_a_family_is_judged_once():
    """Driven by us, refused, or known to draw with the very network."""
    found = pipelines_of_families()
    assert len(found) > 80
    for name, classes in found.items():
        families = [f for f in FAMILIES.values() if f.transformer in classes]
        verdicts = [
            any(is_driven_by(family, name) for family in families),
            why_pipeline_refused(name) is not None,
            name in SAME_NETWORK,
        ]
        assert verdicts.count(True) == 1, (name, classes, verdicts)
    assert SAME_NETWORK.keys() | TWINS.keys() <= found.keys()


@pytest.mark.parametrize("pipeline", SAME_NETWORK)
def test_a_pipeline_for_the_same_network_is_no_reason_to_refuse(pipeline):
    (kind,) = pipelines_of_families()[pipeline]
    family = find_family("auto", {"_class_name": pipeline}, {"_class_name": kind})
    assert why_refused(family, {}, FLOW, {"_class_name": pipeline}) is None


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("flux1", "FluxControlNetPipeline"),
        ("flux2", "Flux2KleinKVPipeline"),
        ("sana", "SanaPAGPipeline"),
        ("sd3", "StableDiffusion3ControlNetInpaintingPipeline"),
        ("zimage", "ZImageControlNetPipeline"),
    ],
)
def test_prompts_of_a_pipeline_for_the_same_network_are_embedded_as_the_familys(
    name, pipeline, tmp_path
):
    family, folder = FAMILIES[name], write_pipeline(tmp_path / "base", name)
    assert pipeline in SAME_NETWORK
    wanted = embed_prompts(family, load_pipeline(folder, family=family), family.prompts, 12)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": pipeline, "controlnet": ["diffusers", None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    loaded = load_pipeline(folder, family=family)
    assert type(loaded).__name__ in family.pipelines
    for one, other in zip(embed_prompts(family, loaded, family.prompts, 12), wanted, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in wanted[0])


def test_a_flow_map_and_the_omnivorous_z_image_are_refused_with_their_reasons():
    for name, pipeline, said in (
        ("flux3", "Flux3DistilledModularPipeline", "it is told two times"),
        ("zimage", "ZImageOmniPipeline", "what a second encoder sees in pictures"),
    ):
        reason = why_refused(FAMILIES[name], {}, FLOW, {"_class_name": pipeline})
        assert reason is not None and said in reason


@pytest.mark.parametrize("kind", [5, ["a"], {}, True])
def test_a_class_that_is_no_text_is_refused(kind):
    config = {"_class_name": kind or {"a": 1}}
    for name in ("auto", "flux2"):
        with pytest.raises(BadData, match="a _class_name that is no text"):
            find_family(name, {}, config)


def test_nothing_that_can_be_ported_is_refused():
    assert not CLASSES.keys() & PORTABLE
    ours = {pipeline for family in FAMILIES.values() for pipeline in family.pipelines}
    assert not PIPELINES.keys() & ours


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_is_refused_or_warned_of_by_its_own_checkpoint(name):
    family, scheduler = FAMILIES[name], scheduler_of(name)
    index = {"_class_name": family.pipelines[0], "transformer": ["diffusers", family.transformer]}
    transformer = dict(case_of(name).transformer)
    assert why_folder_refused(index) is None
    assert why_refused(family, transformer, scheduler, index) is None
    assert distillation_warning(family, transformer, scheduler, index, "models/mine") is None


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_that_cannot_be_ported_is_refused_with_its_reason(kind):
    with pytest.raises(BadData) as refused:
        find_family("auto", {}, {"_class_name": kind})
    wanted = f"the checkpoint's transformer is a {kind}, which cannot be ported: {CLASSES[kind]}"
    assert str(refused.value) == wanted


def test_a_family_of_ones_own_may_still_be_for_such_a_class():
    with pytest.raises(BadRecipe, match=r"but the checkpoint is a PixArtTransformer2DModel"):
        find_family("sd3", {}, {"_class_name": "PixArtTransformer2DModel"})
    assert why_class_refused("MyTransformer") is None
    assert why_class_refused(["no", "name"]) is None


def test_a_u_net_is_refused_though_no_transformer_is_listed():
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "image_encoder": [None, None],
    }
    said = why_folder_refused(index)
    assert said is not None
    assert said.startswith("its unet is a UNet2DConditionModel, which cannot be ported: a U-Net")
    assert why_folder_refused(index | {"transformer": ["diffusers", "X"]}) is None
    assert why_folder_refused({"_class_name": "X"}) is None


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_pipeline_for_something_else_is_refused_with_its_reason(pipeline):
    said = why_refused(FAMILIES["flux1"], {}, FLOW, {"_class_name": pipeline})
    assert said == f"made for {pipeline}, which cannot be ported: {PIPELINES[pipeline]}"


@pytest.mark.parametrize(
    ("modular", "plain"),
    [
        ("FluxKontextModularPipeline", "FluxKontextPipeline"),
        ("QwenImageEditModularPipeline", "QwenImageEditPipeline"),
        ("QwenImageEditPlusModularPipeline", "QwenImageEditPlusPipeline"),
        ("QwenImageLayeredModularPipeline", "QwenImageLayeredPipeline"),
    ],
)
def test_a_modular_pipeline_for_something_else_is_refused_as_the_plain_one(modular, plain):
    assert hasattr(third_party.library("diffusers"), modular)
    said = why_refused(FAMILIES["qwenimage"], {}, FLOW, {"_class_name": modular})
    assert said == f"made for {modular}, which cannot be ported: {PIPELINES[plain]}"
    assert why_refused(FAMILIES["flux1"], {}, FLOW, {"_class_name": "FluxModularPipeline"}) is None


# ---- configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "part"),
    [
        ("flux1", {"in_channels": 384, "out_channels": 64}, "its first map reads a mask"),  # Fill
        ("flux1", {"in_channels": 128, "out_channels": 64}, "a control beside the noise"),
        ("cogview4", {"in_channels": 32, "out_channels": 16}, "a control beside the noise"),
        ("cosmos", {"in_channels": 17, "out_channels": 16}, "it makes films"),
        ("qwenimage", {"zero_cond_t": True}, "it changes a picture that it is given"),
        ("qwenimage", {"use_additional_t_cond": True}, "beside the noise"),  # Layered
    ],
)
def test_a_config_gives_away_what_a_transformer_reads_besides(name, config, part):
    family = FAMILIES[name]
    said = why_refused(family, config, FLOW, {})
    assert said is not None and part in said
    assert said.startswith(f"this {family.transformer} is none that can be ported: ")


def test_a_config_of_any_kind_is_no_crash():
    for value in ("x", None, [], {}):
        config = {"in_channels": value, "out_channels": value, "guidance_embeds": value}
        for family in FAMILIES.values():
            if family.name != "sit":
                assert why_refused(family, config, {"prediction_type": None}, {}) is None
            distillation_warning(family, config, {"_class_name": value}, {}, "x")


@pytest.mark.parametrize(
    ("name", "config", "part"),
    [
        ("flux3", {"flow_map": True}, "distilled"),
        ("hunyuanimage", {"use_meanflow": True}, "distilled"),
        ("kandinsky5", {"visual_cond": True}, "kandinsky5: "),
        ("sana", {"guidance_embeds": True}, "SANA-Sprint"),
    ],
)
def test_what_a_family_looks_for_itself_is_refused_where_it_reads_its_sizes(name, config, part):
    """Two times, TrigFlow, another picture beside the noise."""
    case, family = case_of(name), FAMILIES[name]
    with pytest.raises(BadData, match=part):
        family.geometry({**case.transformer, **config}, dict(case.vae().config))


# ---- schedulers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "part"),
    [
        ({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}, "prediction_type epsilon"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}, "v_prediction: it"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "prediction_type epsilon: it predicts"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"}, "type sample"),
        ({"_class_name": "SCMScheduler", "prediction_type": "trigflow"}, "SCMScheduler: it was"),
        ({"_class_name": "SomeScheduler", "prediction_type": "trigflow"}, "for TrigFlow"),
        ({"_class_name": "FlowMapEulerDiscreteScheduler"}, "it is told two times"),
        ({"_class_name": "EDMEulerScheduler"}, "its output is scaled as EDM has it"),
    ],
)
def test_a_scheduler_of_another_path_is_refused(scheduler, part):
    said = why_refused(FAMILIES["sd3"], {}, scheduler, {})
    assert said is not None and part in said
    assert said.startswith(f"cannot be ported: its scheduler is a {scheduler['_class_name']}")


@pytest.mark.parametrize(
    "scheduler",
    [
        FLOW,
        {},
        {"_class_name": "FlowMatchHeunDiscreteScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
        {"_class_name": "MyScheduler"},
    ],
)
def test_a_scheduler_of_a_flow_is_none_to_refuse(scheduler):
    assert why_refused(FAMILIES["sd3"], {}, scheduler, {}) is None


def test_schedulers_that_take_a_model_for_one_of_noise_are_those_of_diffusers():
    """By the default of the class, where the config does not say."""
    diffusers = third_party.library("diffusers")
    for name in ("DDIM", "PNDM", "EulerDiscrete", "UniPCMultistep", "DEISMultistep", "LCM"):
        default = getattr(diffusers, f"{name}Scheduler")().config.prediction_type
        said = why_refused(FAMILIES["sd3"], {}, {"_class_name": f"{name}Scheduler"}, {})
        assert default == "epsilon" and said is not None and "prediction_type epsilon" in said


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        FLOW,
        FLOW | {"invert_sigmas": True, "num_train_timesteps": 1000},
        {"_class_name": "FlowMatchHeunDiscreteScheduler", "invert_sigmas": False},
    ],
)
def test_the_class_of_dit_is_sit_only_if_its_scheduler_says_so(scheduler):
    said = why_refused(FAMILIES["sit"], {}, scheduler, {})
    assert said is not None and "does not count as SiT's, from noise, 0, to the picture, 1" in said
    named = scheduler.get("_class_name", "of no kind")
    assert f"its scheduler, {named}, does not" in said
    epsilon = why_refused(FAMILIES["sit"], {}, {"_class_name": "DDIMScheduler"}, {})
    assert epsilon is not None and "prediction_type epsilon" in epsilon


# ---- poor starts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "transformer", "scheduler", "index", "called", "part"),
    [
        (
            "flux2",
            {},
            {},
            {"is_distilled": True},
            "models/klein",
            "(model_index.json says is_distilled)",
        ),
        (
            "flux1",
            {"guidance_embeds": False},
            {"use_dynamic_shifting": False},
            {},
            "models/mine",
            "(no guidance and no shift by resolution, as FLUX.1-schnell)",
        ),
        (
            "zimage",
            {},
            {},
            {},
            "models/Z-Image-Turbo",
            "(by its name, models/Z-Image-Turbo)",
        ),
        (
            "sd3",
            {"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"},
            {},
            {},
            "mine",
            "(by its name, stabilityai/stable-diffusion-3.5-large-turbo)",
        ),
        (
            "qwenimage",
            {},
            {},
            {"_name_or_path": "somebody/Qwen-Image-Lightning-8steps"},
            "mine",
            "(by its name, somebody/Qwen-Image-Lightning-8steps)",
        ),
        (
            "flux2",
            {},
            {},
            {"_class_name": "Flux2KleinModularPipeline"},
            "mine",
            "(made for Flux2KleinModularPipeline)",
        ),
        (
            "flux2",
            {},
            {},
            {"_class_name": "Flux2KleinKVPipeline"},
            "mine",
            "(made for Flux2KleinKVPipeline)",
        ),
        (
            "krea2",
            {},
            {},
            {"_class_name": "Krea2TurboModularPipeline"},
            "mine",
            "(made for Krea2TurboModularPipeline)",
        ),
        (
            "qwenimage21",
            {},
            {},
            {"_class_name": "QwenImage21TurboModularPipeline"},
            "mine",
            "(made for QwenImage21TurboModularPipeline)",
        ),
        (
            "qwenimage",
            {},
            {},
            {"_class_name": "MyQwenLightningPipeline"},
            "mine",
            "(made for MyQwenLightningPipeline)",
        ),
        (
            "sd3",
            {},
            {"_class_name": "FlowMatchLCMScheduler"},
            {},
            "mine",
            "(its scheduler is a FlowMatchLCMScheduler)",
        ),
    ],
)
def test_a_distilled_checkpoint_is_told_with_a_better_base(
    name, transformer, scheduler, index, called, part
):
    family = FAMILIES[name]
    said = distillation_warning(family, transformer, scheduler, index, called)
    assert said is not None and part in said
    assert said.startswith(f"{called}: distilled to draw in a few steps (")
    assert "It can be ported, but is a poor start: training asks for the velocity" in said
    base = said.partition("Better start from ")[2].split(" or ")
    assert base and set(base) <= set(family.checkpoints)
    assert not any(map(is_distilled_name, base))
    assert why_refused(family, transformer, scheduler, index) is None


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": "Flux2KleinBaseModularPipeline"},
        {"_class_name": "Flux2KleinModularPipeline", "is_distilled": False},
        {"_class_name": "Flux2KleinPipeline", "is_distilled": False},
        {"_class_name": "MyUndistilledPipeline"},
        {"_class_name": ["a", "b"]},
        {},
    ],
)
def test_a_pipeline_for_models_of_many_steps_is_no_sign(index):
    assert distillation_warning(FAMILIES["flux2"], {}, {}, index, "mine") is None


def test_flux1_schnell_is_not_offered_as_a_better_base():
    said = distillation_warning(FAMILIES["flux1"], {}, {}, {}, "FLUX.1-schnell")
    assert said is not None and said.endswith("Better start from black-forest-labs/FLUX.1-dev")


def test_where_no_base_is_known_its_teacher_is_named():
    said = distillation_warning(FAMILIES["flux3"], {}, {}, {}, "flux3-turbo")
    assert said is not None and said.endswith("the model that it was distilled from")


@pytest.mark.parametrize(
    "name",
    [
        "black-forest-labs/FLUX.1-schnell",
        "Tongyi-MAI/Z-Image-Turbo",
        "/data/models--Tongyi-MAI--Z-Image-Turbo/snapshots/0a1b2c",
        "sd3.5_large_turbo",
        "lodestones/Chroma1-Flash",
        "kandinsky-distilled16steps",
        "my-port-4steps",
        "some-8-step-model",
        "model-dmd2",
    ],
)
def test_names_that_say_distilled(name):
    assert is_distilled_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "black-forest-labs/FLUX.1-dev",
        "flux-de-distilled",
        "flux-dedistilled",
        "undistilled",
        "/home/turbo/models/Z-Image",
        "Qwen/Qwen-Image-2512",
        "FLUX.2-klein-base-4B",
        "footsteps",
        "",
    ],
)
def test_names_that_do_not(name):
    assert not is_distilled_name(name)


def test_a_family_is_warned_of_by_no_name_of_a_base():
    for family in FAMILIES.values():
        assert not any(is_distilled_name(name) for name in family.checkpoints)

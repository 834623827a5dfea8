"""Checkpoints that cannot be ported, and those that are poor to start from; each with its reason.

A port needs a plain velocity of the straight path, told from one time, and one linear map that
reads the latent and nothing else. What is not so is recognised by classes, configs and names.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from asymlift.families.base import Config, Family

CURVED = "it predicts noise, or v, on the curved path of DDPM; a port needs the straight one's"
U_NET = f"a U-Net, no transformer: no linear map reads tokens of its latent, and {CURVED}"
FILM = "it makes films, and a port has pictures only"
SOUND = "it makes sound"
PROTEIN = "it makes proteins"
MASKED = "it fills in masked tokens of a codebook, and follows no velocity"
PRIOR = "it makes the embedding of a picture, not the picture"
CODES = (
    "besides the prompt it is told codes of the very picture, which a language model draws first; "
    "training would need them for every picture"
)
EDITS = (
    "it changes a picture that it is given, and reads that beside the noise; "
    "start from the text-to-image model of the same kind"
)
CONDITION = (
    "its first map reads a mask, a picture or a control beside the noise; "
    "start from the text-to-image model of the same kind"
)
TWO_TIMES = (
    "it is told two times, since it was distilled to jump from the one to the other; "
    "start from the model that it was distilled from"
)
TRIGFLOW = (
    "it was distilled for TrigFlow, on a circle instead of the straight path; "
    "start from the model that it was distilled from"
)
WEIGHTED = "its output is scaled as EDM has it, and is no velocity of the straight path"
PIXELS = "it makes pixels already, and says the picture instead of a velocity"
SEES = (
    "it shares its network between words and what a second encoder sees in pictures; "
    "start from the text-to-image model of the same kind"
)

# Classes of diffusers -> why no checkpoint of theirs can be ported.
CLASSES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "AudioLDM2UNet2DConditionModel",
            "DreamLiteTransformer2DModel",
            "DreamLiteUNetModel",
            "I2VGenXLUNet",
            "Kandinsky3UNet",
            "StableCascadeUNet",
            "UNet1DModel",
            "UNet2DConditionModel",  # Stable Diffusion 1 to XL, Kolors, Kandinsky 2
            "UNet2DModel",
            "UNet3DConditionModel",
            "UNetControlNetXSModel",
            "UNetMotionModel",
            "UNetSpatioTemporalConditionModel",
        ),
        U_NET,
    ),
    **dict.fromkeys(
        (
            "CogView3PlusTransformer2DModel",
            "HunyuanDiT2DModel",
            "PixArtTransformer2DModel",
            "Transformer2DModel",  # PixArt and DiT, as they were first saved
            "UniDiffuserModel",
        ),
        CURVED,
    ),
    **dict.fromkeys(
        (
            "AllegroTransformer3DModel",
            "AnyFlowFARTransformer3DModel",
            "AnyFlowTransformer3DModel",
            "ChronoEditTransformer3DModel",
            "CogVideoXTransformer3DModel",
            "ConsisIDTransformer3DModel",
            "Cosmos3OmniTransformer",
            "EasyAnimateTransformer3DModel",
            "HeliosTransformer3DModel",
            "HunyuanVideo15Transformer3DModel",
            "HunyuanVideoFramepackTransformer3DModel",
            "HunyuanVideoTransformer3DModel",
            "Kandinsky6SRTransformer3DModel",
            "Kandinsky6Transformer3DModel",
            "LTX2VideoTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "LatteTransformer3DModel",
            "MiniMaxH3Transformer3DModel",
            "MochiTransformer3DModel",
            "MotifVideoTransformer3DModel",
            "SanaVideoTransformer3DModel",
            "SanaWMLTX2RefinerTransformer3DModel",
            "SanaWMTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "TransformerTemporalModel",
            "WanAnimate2Transformer3DModel",
            "WanAnimateTransformer3DModel",
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
        ),
        FILM,
    ),
    **dict.fromkeys(
        (
            "AceStepTransformer1DModel",
            "LongCatAudioDiTTransformer",
            "MiniMaxMusic3Transformer1DModel",
            "StableAudio3DiTModel",
            "StableAudioDiTModel",
        ),
        SOUND,
    ),
    "GlmImageTransformer2DModel": CODES,
    "JoyImageEditPlusTransformer3DModel": EDITS,
    "JoyImageEditTransformer3DModel": EDITS,
    "PriorTransformer": PRIOR,
    "RFD4ProteinaTransformer": PROTEIN,
    "UVit2DModel": MASKED,
}

# Pipelines that run the transformer of a family on something else than noise and a prompt; one
# that has a modular twin stands for both.
PIPELINES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "BriaFiboEditPipeline",
            "FluxKontextInpaintPipeline",
            "FluxKontextPipeline",
            "Kandinsky5I2IPipeline",
            "LongCatImageEditPipeline",
            "QwenImageEditInpaintPipeline",
            "QwenImageEditPipeline",
            "QwenImageEditPlusPipeline",
        ),
        EDITS,
    ),
    **dict.fromkeys(
        (
            "CogView4ControlPipeline",
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            "FluxControlPipeline",
            "FluxFillPipeline",
            "HunyuanImageRefinerPipeline",
            "QwenImageLayeredPipeline",
            "VisualClozeGenerationPipeline",
            "VisualClozePipeline",
        ),
        CONDITION,
    ),
    **dict.fromkeys(
        (
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Kandinsky5I2VPipeline",
            "Kandinsky5T2VPipeline",
        ),
        FILM,
    ),
    **dict.fromkeys(("SanaSprintImg2ImgPipeline", "SanaSprintPipeline"), TRIGFLOW),
    "Flux3DistilledModularPipeline": TWO_TIMES,
    "PRXPixelPipeline": PIXELS,
    "ZImageOmniPipeline": SEES,
}

FROM_A_PICTURE = "it begins between noise and a picture"
MASK = "it keeps what is outside a mask, beside the network"
CONTROL_NET = "a second network adds to its blocks, and what it is told"
PERTURBED = "it goes, besides, against its own attention perturbed"

# Pipelines that draw with the very network of a family's own pipeline, from a prompt that is
# embedded alike; each with what it adds.
SAME_NETWORK: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "ChromaImg2ImgPipeline",
            "FluxImg2ImgPipeline",
            "QwenImageImg2ImgPipeline",
            "StableDiffusion3Img2ImgPipeline",
            "ZImageImg2ImgPipeline",
        ),
        FROM_A_PICTURE,
    ),
    **dict.fromkeys(
        (
            "ChromaInpaintPipeline",
            "Flux2KleinInpaintPipeline",
            "FluxInpaintPipeline",
            "QwenImageInpaintPipeline",
            "StableDiffusion3InpaintPipeline",
            "ZImageInpaintPipeline",
        ),
        MASK,
    ),
    **dict.fromkeys(
        (
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
            "FluxControlNetPipeline",
            "QwenImageControlNetInpaintPipeline",
            "QwenImageControlNetPipeline",
            "SanaControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
            "StableDiffusion3ControlNetPipeline",
            "ZImageControlNetInpaintPipeline",
            "ZImageControlNetPipeline",
        ),
        CONTROL_NET,
    ),
    **dict.fromkeys(
        ("SanaPAGPipeline", "StableDiffusion3PAGImg2ImgPipeline", "StableDiffusion3PAGPipeline"),
        PERTURBED,
    ),
    "Flux2KleinKVPipeline": "it reads pictures to go by once, at time 0, and keeps their keys",
}

# Modular pipelines whose plain twins are not called as they are.
TWINS: Mapping[str, str] = {
    "Flux2KleinBaseModularPipeline": "Flux2KleinPipeline",
    "Krea2TurboModularPipeline": "Krea2Pipeline",
    "QwenImage21TurboModularPipeline": "QwenImage21Pipeline",
}


@dataclass(frozen=True)
class Sign:
    """What a transformer's own config gives away."""

    transformer: str
    holds: Callable[[Config], bool]
    reason: str


def _reads_more_than_it_writes(config: Config) -> bool:
    read, written = config.get("in_channels"), config.get("out_channels")
    return isinstance(read, int) and isinstance(written, int) and read > written


SIGNS = (  # a family looks for others itself, where it reads its sizes
    Sign("FluxTransformer2DModel", _reads_more_than_it_writes, CONDITION),  # Fill and Control
    Sign("CogView4Transformer2DModel", _reads_more_than_it_writes, CONDITION),
    Sign("CosmosTransformer3DModel", _reads_more_than_it_writes, FILM),
    Sign("QwenImageTransformer2DModel", lambda config: config.get("zero_cond_t") is True, EDITS),
    Sign(
        "QwenImageTransformer2DModel",
        lambda config: config.get("use_additional_t_cond") is True,
        CONDITION,
    ),
)

# Schedulers that take a model for one that predicts noise, unless their config says otherwise.
OF_NOISE = re.compile(
    r"(DDPM|DDIM|PNDM|IPNDM|DEIS|DPMSolver|UniPC|Euler|Heun|KDPM2|LMS|LCM|TCD|SASolver)"
)
OF_A_FLOW = re.compile(r"flow")


def why_class_refused(name: object) -> str | None:
    """Return why no checkpoint of this class can be ported."""
    reason = CLASSES.get(str(name))
    return reason and f"a {name}, which cannot be ported: {reason}"


def why_pipeline_refused(name: str) -> str | None:
    """Return why what this pipeline drives cannot be ported; a modular one is as the other."""
    return PIPELINES.get(name) or PIPELINES.get(plain_twin(name))


def plain_twin(name: str) -> str:
    """Return what the plain pipeline is called that does what a modular one does."""
    return TWINS.get(name, name.replace("ModularPipeline", "Pipeline"))


def is_driven_by(family: Family, name: str) -> bool:
    """Whether a pipeline runs the network as the family's `run` does, whatever it is given."""
    return name in family.pipelines or plain_twin(name) in family.pipelines


def why_folder_refused(model_index: Config) -> str | None:
    """Return why a pipeline that lists no transformer cannot be ported."""
    listed = {
        name: entry[1]
        for name, entry in model_index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1]
    }
    if "transformer" in listed:
        return None
    return next(
        (f"its {name} is {why}" for name, c in listed.items() if (why := why_class_refused(c))),
        None,
    )


def why_refused(
    family: Family, transformer_config: Config, scheduler_config: Config, model_index: Config
) -> str | None:
    """Return why this checkpoint cannot be ported, although its transformer is of a family."""
    pipeline = str(model_index.get("_class_name"))
    if reason := why_pipeline_refused(pipeline):
        return f"made for {pipeline}, which cannot be ported: {reason}"
    for sign in SIGNS:
        if sign.transformer == family.transformer and sign.holds(transformer_config):
            return f"this {sign.transformer} is none that can be ported: {sign.reason}"
    return _why_scheduler_refused(family, scheduler_config)


def _why_scheduler_refused(family: Family, config: Config) -> str | None:
    kind, predicted = str(config.get("_class_name", "")), config.get("prediction_type")
    said = f"cannot be ported: its scheduler is a {kind}"
    if kind == "SCMScheduler" or predicted == "trigflow":
        return f"{said}: {TRIGFLOW}"
    if kind == "FlowMapEulerDiscreteScheduler":
        return f"{said}: {TWO_TIMES}"
    if kind.startswith("EDM"):
        return f"{said}: {WEIGHTED}"
    if not kind.startswith("FlowMatch"):
        if predicted is None and OF_NOISE.match(kind):
            predicted = "epsilon"
        if predicted is not None and not OF_A_FLOW.match(str(predicted)):
            return f"{said} with prediction_type {predicted}: {CURVED}"
    if family.transformer == "DiTTransformer2DModel" and not _counts_as_sit_does(config):
        return (
            f"cannot be ported: its scheduler, {kind or 'of no kind'}, does not count as SiT's, "
            "from noise, 0, to the picture, 1; if the model was trained so, scheduler_config.json "
            "says FlowMatchEulerDiscreteScheduler, invert_sigmas true, num_train_timesteps 1"
        )
    return None


def _counts_as_sit_does(config: Config) -> bool:
    return config.get("invert_sigmas") is True and config.get("num_train_timesteps") == 1


# ---- poor starts -------------------------------------------------------------------------------

FEW_STEPS = {"schnell", "turbo", "lightning", "hyper", "lcm", "dmd", "dmd2", "tcd", "flash"}
# Pipelines for distilled models whose names do not say so, unless the index says `is_distilled`.
FOR_DISTILLED = {"Flux2KleinKVPipeline", "Flux2KleinModularPipeline"}


def distillation_warning(
    family: Family,
    transformer_config: Config,
    scheduler_config: Config,
    model_index: Config,
    called: str,
) -> str | None:
    """Return why a checkpoint that can be ported is a poor start; `called` is its folder."""
    sign = _sign_of_distillation(family, transformer_config, scheduler_config, model_index, called)
    if sign is None:
        return None
    bases = " or ".join(name for name in family.checkpoints if not is_distilled_name(name))
    return (
        f"{called}: distilled to draw in a few steps ({sign}). It can be ported, but is a poor "
        "start: training asks for the velocity at every level, and what it knows of jumps is "
        f"unlearnt first. Better start from {bases or 'the model that it was distilled from'}"
    )


def _sign_of_distillation(
    family: Family,
    transformer_config: Config,
    scheduler_config: Config,
    model_index: Config,
    called: str,
) -> str | None:
    said, pipeline = model_index.get("is_distilled"), str(model_index.get("_class_name"))
    if said is True:
        return "model_index.json says is_distilled"
    if _says_distilled(_apart(pipeline)) or (pipeline in FOR_DISTILLED and said is not False):
        return f"made for {pipeline}"
    if scheduler_config.get("_class_name") == "FlowMatchLCMScheduler":
        return "its scheduler is a FlowMatchLCMScheduler"
    unguided = transformer_config.get("guidance_embeds") is False
    unshifted = scheduler_config.get("use_dynamic_shifting") is False
    if family.transformer == "FluxTransformer2DModel" and unguided and unshifted:
        return "no guidance and no shift by resolution, as FLUX.1-schnell"
    names = (called, transformer_config.get("_name_or_path"), model_index.get("_name_or_path"))
    found = next((str(name) for name in names if name and is_distilled_name(str(name))), None)
    return f"by its name, {found}" if found else None


def is_distilled_name(name: str) -> bool:
    """Whether the last part of a path, or what the hub's cache calls a model, says so."""
    parts = PurePath(name).parts
    named = [*parts[-1:], *(part for part in parts if part.startswith("models--"))]
    return any(map(_says_distilled, named))


def _says_distilled(name: str) -> bool:
    words = re.findall(r"[a-z]+[0-9]?|[0-9]+", name.lower())
    undone = "de" in words or "un" in words
    few = any(word in FEW_STEPS or word.startswith("distill") for word in words)
    counted = bool(re.search(r"[0-9]-?steps?\b", name.lower()))
    return (few or counted) and not undone


def _apart(class_name: str) -> str:
    """Return Krea2TurboModularPipeline as Krea2-Turbo-Modular-Pipeline."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", class_name)

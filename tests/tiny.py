"""Tiny random models of the real classes, so that every claim is tested on the code that ships.

A latent has 4 channels and is 4 times smaller than its picture; a token is 2 x 2 latent cells:
p = 8, d = 16, D = 192, C' = 48. Nothing here is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asymlift.families import FAMILIES
from asymlift.families.base import Family, Geometry, Text
from asymlift.maths.lift import lift_first, lift_last
from asymlift.model.pixel_flow import LatentFlow, PixelFlow
from asymlift.runtime import third_party

CHANNELS, WORDS, LENGTH = 4, 24, 7  # latent channels, width and number of text tokens
GRID = (4, 6)  # tokens of a picture of 32 x 48 pixels

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "flux2": {
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    },
    "sd3": {
        "sample_size": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WORDS,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "zimage": {
        "in_channels": CHANNELS,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WORDS,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 32, 32],
    },
}

VAES = {"flux2": "AutoencoderKLFlux2", "sd3": "AutoencoderKL", "zimage": "AutoencoderKL"}
VAE_SIZES: dict[str, Any] = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": CHANNELS,
}
VAE_CONSTANTS: dict[str, dict[str, Any]] = {
    "flux2": {},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "zimage": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "flux2": {"use_dynamic_shifting": True},
    "sd3": {"shift": 3.0},
    "zimage": {"shift": 3.0},
}


# -- the parts of a checkpoint


def tiny_transformer(name: str, *, seed: int = 1, **changes: Any) -> Any:
    """Return the real class with large random weights, so that nothing in it is dead."""
    diffusers = third_party.library("diffusers")
    net = getattr(diffusers, FAMILIES[name].transformer)(**{**TRANSFORMERS[name], **changes})
    randomise(net, seed)
    return net.eval()


def tiny_vae(name: str, *, seed: int = 2) -> Any:
    """Return the family's VAE, 4 times down, with latent statistics that matter."""
    diffusers = third_party.library("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = getattr(diffusers, VAES[name])(**VAE_SIZES, **VAE_CONSTANTS[name])
        if hasattr(vae, "bn"):
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval()


def tiny_text(name: str, batch: int, *, seed: int = 3, dtype: torch.dtype = torch.float32) -> Text:
    """Return what `collate` makes of random embeddings, ragged where the family allows it."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    samples: dict[str, Callable[[int], dict[str, Tensor]]] = {
        "flux2": lambda i: {"encoder_hidden_states": noise(LENGTH, WORDS)},
        "sd3": lambda i: {
            "encoder_hidden_states": noise(LENGTH, WORDS),
            "pooled_projections": noise(20),
        },
        "zimage": lambda i: {"cap_feats": noise(LENGTH + i, WORDS)},
    }
    return FAMILIES[name].collate([samples[name](i) for i in range(batch)])


def randomise(net: nn.Module, seed: int) -> None:
    """Fill every weight with noise; norms stay around one."""
    g = torch.Generator().manual_seed(seed)
    for path, weight in net.named_parameters():
        scale = 0.2 if weight.ndim > 1 else 0.1
        centre = 1.0 if "norm" in path and weight.ndim == 1 and path.endswith("weight") else 0.0
        weight.data.copy_(centre + scale * torch.randn(weight.shape, generator=g))


# -- the latent model and its lifted twin


@dataclass(frozen=True)
class Pair:
    """A latent model, the same model in pixels, and what relates them."""

    latent: LatentFlow
    pixel: PixelFlow
    A: Tensor  # (D, d)
    s: float
    geometry: Geometry
    text: Text  # for two samples


def tiny_geometry(name: str) -> Geometry:
    return FAMILIES[name].geometry(dict(tiny_transformer(name).config), VAE_SIZES)


def random_basis(geometry: Geometry, *, seed: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(geometry.D, geometry.d, generator=g, dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def lift(net: Any, family: Family, geometry: Geometry, A: Tensor) -> Any:
    """Return the same class with both maps widened: conversion, in memory."""
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    pixel = type(net).from_config(config | family.channels(geometry.pixel_channels))
    weights, patch = net.state_dict(), geometry.patch
    first = f"{family.first}.weight"
    A = A.to(weights[first].dtype)
    weights[first] = lift_first(weights[first], A, patch=patch, order=family.order_in)
    for last in (f"{family.last}.weight", f"{family.last}.bias"):
        if last in weights:
            weights[last] = lift_last(weights[last], A, patch=patch, order=family.order_out)
    pixel.to(A.dtype).load_state_dict(weights)
    return pixel.eval()


def lifted_pair(
    name: str,
    *,
    s: float = 0.7,
    dtype: torch.dtype = torch.float64,
    precision: torch.dtype | None = None,
    family: Family | None = None,
    net: Any = None,
) -> Pair:
    """Return two models that must agree; float64 unless asked otherwise."""
    family = family or FAMILIES[name]
    net = (tiny_transformer(name) if net is None else net).double()
    geometry = tiny_geometry(name)
    A = random_basis(geometry)
    pixel = lift(net, family, geometry, A).to(dtype)  # in float64, cast once
    A = A.to(dtype)
    return Pair(
        LatentFlow(net.to(dtype), family, geometry, precision),
        PixelFlow(pixel, family, geometry, A, s, precision),
        A,
        s,
        geometry,
        tiny_text(name, 2, dtype=dtype),
    )


# -- whole pipelines, text encoders included


def tiny_pipeline(name: str, *, transformer: Any = None, vae: Any = None) -> Any:
    """Return the real pipeline around tiny parts; it can be called with a prompt."""
    diffusers = third_party.library("diffusers")
    pipeline = getattr(diffusers, FAMILIES[name].pipelines[0])(
        transformer=tiny_transformer(name) if transformer is None else transformer,
        vae=tiny_vae(name) if vae is None else vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[name]),
        **TEXT_PARTS[name](),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_pipeline(folder: Path, name: str, **parts: Any) -> Path:
    """Save a whole tiny pipeline as a diffusers folder, as a user would have it."""
    tiny_pipeline(name, **parts).save_pretrained(folder)
    return folder


def _qwen(hidden: int, layers: int, head: str) -> dict[str, Any]:
    transformers = third_party.library("transformers")
    from tokenizers.pre_tokenizers import ByteLevel

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: i for i, piece in enumerate(marks + sorted(ByteLevel.alphabet()))}
    tokenizer = transformers.Qwen2TokenizerFast(
        vocab=vocabulary,
        merges=[],
        pad_token=marks[0],
        eos_token=marks[2],
        additional_special_tokens=marks[1:2],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    config = transformers.Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return {"text_encoder": _seeded(getattr(transformers, head), config), "tokenizer": tokenizer}


def _clips_and_t5() -> dict[str, Any]:
    transformers = third_party.library("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    parts: dict[str, Any] = {}
    for suffix, width in (("", 8), ("_2", 12)):
        parts[f"tokenizer{suffix}"] = transformers.CLIPTokenizer(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16
        )
        config = transformers.CLIPTextConfig(
            vocab_size=len(pieces),
            hidden_size=width,
            projection_dim=width,  # 8 + 12 is the width of the pooled embedding
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        parts[f"text_encoder{suffix}"] = _seeded(transformers.CLIPTextModelWithProjection, config)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    words += [(letter, -3.0) for letter in letters]
    parts["tokenizer_3"] = transformers.T5TokenizerFast(vocab=words, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=WORDS, d_kv=8, d_ff=16, num_layers=2, num_heads=2
    )
    parts["text_encoder_3"] = _seeded(transformers.T5EncoderModel, config)
    return parts


def _seeded(model: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = model(config).eval()
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.data.normal_(std=0.3)  # 0.02, the default, leaves prompts alike
        return net


TEXT_PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "flux2": lambda: _qwen(WORDS // 3, 28, "Qwen3ForCausalLM"),  # it stacks layers 9, 18 and 27
    "sd3": _clips_and_t5,
    "zimage": lambda: _qwen(WORDS, 3, "Qwen3Model"),
}

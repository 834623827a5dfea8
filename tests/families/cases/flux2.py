"""FLUX.2 klein and dev, tiny."""

from torch.nn import functional

from tests.families.case import (
    CHANNELS,
    FOUR_LEVELS,
    LENGTH,
    WORDS,
    Case,
    Published,
    as_tokens,
    diffusers_part,
    flow_scheduler,
    read_packed,
    small_vae,
)
from tests.families.text_parts import qwen3


def vae():
    made = diffusers_part("AutoencoderKLFlux2", **small_vae())()
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made


CASE = Case(
    transformer={
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
    vae=vae,
    scheduler=flow_scheduler(use_dynamic_shifting=True),
    text_parts=lambda: qwen3(WORDS // 3, 28, "Qwen3ForCausalLM"),  # it stacks layers 9, 18 and 27
    sample=lambda noise, i: {"encoder_hidden_states": noise(LENGTH, WORDS)},
    read=read_packed("encoder_hidden_states"),
    write=as_tokens,
    start=lambda image: functional.pixel_unshuffle(image, 2),
    published=(
        Published(
            "black-forest-labs/FLUX.2-dev",
            {"guidance_embeds": True},
            {"latent_channels": 32, "patch_size": [2, 2]} | FOUR_LEVELS,
            d=128,
            D=768,
        ),
        Published(
            "black-forest-labs/FLUX.2-klein-base-9B",
            {
                "guidance_embeds": False,
                "num_layers": 8,
                "num_single_layers": 24,
                "num_attention_heads": 32,
                "joint_attention_dim": 12288,
            },
            {"latent_channels": 32, "patch_size": [2, 2]} | FOUR_LEVELS,
            d=128,
            D=768,
        ),
    ),
    options={"guidance_scale": 1.0},
    mu=lambda module, num_tokens, steps: float(module.compute_empirical_mu(num_tokens, steps)),
)

"""A model that diffusers does not know, and the family that makes it portable.

This is all that somebody writes for a model of their own; docs/porting.md goes through it. The
VAE is one linear map of 4 x 4 pixels, the text encoder a table of letters.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from asymlift.families.base import Config, Family, Geometry, Text, check_channels, plain_shift
from asymlift.families.text import padded_text

FACTOR, PATCH, LENGTH = 4, 2, 16


class OwnTransformer(ModelMixin, ConfigMixin):
    """Reads latent maps and words; says x0 - eps at time 1 - tau."""

    @register_to_config
    def __init__(self, in_channels: int = 4, width: int = 32, words: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2 * in_channels, width)
        self.text = nn.Linear(words, width)
        self.clock = nn.Linear(1, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, PATCH**2 * in_channels)

    def forward(self, latent: Tensor, time: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        h, w = latent.shape[-2] // PATCH, latent.shape[-1] // PATCH
        tokens = functional.pixel_unshuffle(latent, PATCH).flatten(2).mT  # (B, h w, C q q)
        tokens = self.embed(tokens) + self.clock(time[:, None, None])
        stream = torch.cat([tokens, self.text(words)], dim=1)
        hidden = torch.cat([mask.new_zeros(len(mask), h * w), ~mask], dim=1)
        for block in self.blocks:
            stream = block(stream, src_key_padding_mask=hidden)
        out = self.out(self.norm(stream[:, : h * w]))
        return functional.pixel_shuffle(out.mT.unflatten(2, (h, w)), PATCH)


class OwnVae(ModelMixin, ConfigMixin):
    """The mean of each 4 x 4 patch, colour by colour, and one slope."""

    @register_to_config
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, channels, FACTOR, FACTOR, bias=False)
        self.up = nn.ConvTranspose2d(channels, 3, FACTOR, FACTOR, bias=False)


class OwnTextEncoder(ModelMixin, ConfigMixin):
    """A vector for each letter."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.letters = nn.Embedding(128, width)


class OwnPipeline(DiffusionPipeline):
    """Holds the parts; it need not sample."""

    def __init__(self, transformer: Any, vae: Any, text_encoder: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, scheduler=scheduler
        )


# -- what asymlift has to be told


def geometry(transformer: Config, vae: Config) -> Geometry:
    return check_channels(Geometry(FACTOR, vae["channels"], PATCH), transformer["in_channels"])


def run(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    out: Tensor = net(latent, time.to(latent.dtype), text["words"], text["mask"])
    return out


@torch.no_grad()
def encode_latents(vae: Any, image: Tensor) -> Tensor:
    z: Tensor = vae.down(image.to(vae.dtype)).float()
    return z


@torch.no_grad()
def decode_latents(vae: Any, z: Tensor) -> Tensor:
    image: Tensor = vae.up(z.to(vae.dtype))
    return image.clamp(-1, 1)


@torch.no_grad()
def encode_prompt(
    pipeline: Any, prompts: list[str], max_length: int | None = None
) -> list[dict[str, Tensor]]:
    device = pipeline.text_encoder.device
    codes = [[0, *prompt.encode("ascii", "ignore")][: max_length or LENGTH] for prompt in prompts]
    return [
        {"words": pipeline.text_encoder.letters(torch.tensor(code, device=device))}
        for code in codes
    ]


FAMILY = Family(
    name="own",
    transformer="tests.own_model:OwnTransformer",
    pipelines=("OwnPipeline",),
    first="embed",
    last="out",
    final_norm="norm",
    order_in="c p q",
    order_out="c p q",
    sign=-1,
    geometry=geometry,
    channels=lambda c: {"in_channels": c},
    time=lambda tau, num_tokens: 1 - tau,
    run=run,
    encode_latents=encode_latents,
    decode_latents=decode_latents,
    encode_prompt=encode_prompt,
    collate=padded_text("words", "mask"),
    text_shapes=lambda config, length: {"words": (length or LENGTH, config["words"])},
    base_shift=plain_shift,
    lora_targets=("blocks.*.linear1", "blocks.*.linear2"),
    checkpoints=(),
    tier="easy",
    library="tests.own_model",
)

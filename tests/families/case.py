"""What the tests know of a family apart from us: tiny parts, and how its pipeline is wired.

Everything here is taken from diffusers, nothing from our families: that is what makes it a proof.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.families.base import Geometry, Text
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.runtime import third_party

Noise = Callable[..., Tensor]  # shape -> random numbers
PROMPT = "a bee"
Grid = tuple[int, int]

CHANNELS, WORDS, LENGTH = 4, 24, 7  # latent channels, width and number of text tokens
USUAL = Geometry(vae_factor=4, channels=CHANNELS, patch=2)


@dataclass(frozen=True)
class Published:
    """A checkpoint as its authors released it; the sizes are what a user must be told."""

    name: str  # on the hub
    transformer: Mapping[str, Any]  # its config, where it is not the class's default
    vae: Mapping[str, Any]
    d: int
    D: int


@dataclass(frozen=True)
class Case:
    """A tiny model of the real classes, and the calls that the real pipeline makes."""

    transformer: Mapping[str, Any]  # config, small and with nothing dead in it
    vae: Callable[[], Any]
    scheduler: Callable[[], Any]
    text_parts: Callable[[], dict[str, Any]]  # of the pipeline: encoders, tokenizers, processors
    sample: Callable[[Noise, int], dict[str, Tensor]]  # random embedding of the i-th prompt
    read: Callable[[dict[str, Any]], tuple[Tensor, Tensor, Text]]  # its call -> map, time, text
    write: Callable[[Tensor], Any]  # map -> what the transformer answers
    start: Callable[[Tensor], Tensor]  # map -> the pipeline's argument `latents`
    published: tuple[Published, ...]
    options: Mapping[str, Any] = field(default_factory=dict)  # of the call, so that it is unguided
    asked: Mapping[str, Any] | None = None  # what the call says instead of a prompt and a size
    sizes: Geometry = USUAL
    grid: Grid = (4, 6)  # tokens of the picture
    last_block: str = "s.1"  # how the path of the last block ends
    blocks: frozenset[str] = frozenset()  # kinds of block, if the class does not list them
    length_name: str = "max_sequence_length"  # the pipeline's argument for `length`; "": none
    length: int = 12  # words that the tests ask for
    cuts: tuple[bool, bool] = (True, True)  # long prompts: to the length asked for; by default
    pipeline_parts: Mapping[str, Any] = field(default_factory=dict)  # further arguments of it
    told: Callable[[Any], None] = lambda pipeline: None  # what the pipeline is told once it is made
    loose: frozenset[str] = frozenset()  # names of embeddings that are as long as the prompt
    answer: str = "hidden_states"  # the argument whose place and form the answer has
    state: Callable[[Tensor], Tensor] | None = None  # the scheduler's state -> map; else by `read`
    levels: Callable[[Any], Tensor] = lambda scheduler: scheduler.sigmas[:-1]
    timesteps: Callable[[Tensor, int], Tensor] | None = None  # (levels, tokens); 1000 times levels
    sigmas: Callable[[Tensor], Tensor] = lambda levels: levels  # what the scheduler calls them
    inverted: bool = False  # its scheduler counts from noise, 0, up to the picture, 1
    most_noise: float = 1.0  # the highest level that the pipeline can start from
    rounding: float = 0.0  # of the pipeline's pictures
    raw_latent: Callable[[Any, Tensor], Tensor] = lambda vae, image: (  # (VAE, image) -> (B, ...)
        vae.encode(image).latent_dist.mode()
    )
    decoded: Callable[[Any, Tensor], Tensor] = lambda vae, raw: vae.decode(raw).sample
    vae_channels: str = "latent_channels"  # in the VAE's config
    mu: Callable[[Any, int, int], float | None] = lambda module, num_tokens, steps: None
    own_shift: Callable[[int], float] = lambda num_tokens: 1.0  # which the pipeline adds by itself
    shared_modulation: str = ""  # why the final norm's weights steer the blocks too
    assemble: Callable[[dict[str, Any]], Any] | None = None  # makes the pipeline; else its class
    save: Callable[[Any, Path], None] = lambda pipeline, folder: pipeline.save_pretrained(folder)
    drive: Callable[[Any, Mapping[str, Any]], Any] = lambda pipeline, call: (  # -> pictures
        pipeline(**call, return_dict=False)[0]
    )

    @property
    def height(self) -> int:
        return self.grid[0] * self.sizes.pixel_patch

    @property
    def width(self) -> int:
        return self.grid[1] * self.sizes.pixel_patch

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline: one picture, without guidance."""
        usual = {"prompt": PROMPT, "height": self.height, "width": self.width}
        asked = usual if self.asked is None else self.asked
        length = {self.length_name: self.length} if self.length_name else {}
        return {**asked, **length, **self.options}

    def read_answer(self, raw: Any, call: dict[str, Any]) -> Tensor:
        """What the transformer answered to this call, as a map."""
        assert self.answer in call, (
            f"the transformer is called with {sorted(call)}; which of them is the latent? "
            f"set `answer`, which is {self.answer!r}"
        )
        return self.read({**call, self.answer: raw})[0]

    def read_state(self, state: Tensor) -> Tensor:
        """What the scheduler made, as a map: tokens or a map already, unless the case says."""
        if self.state is not None:
            return self.state(state)
        return state if state.ndim == 4 else tokens_to_image(state, self.sizes.patch, self.grid)


@cache
def case_of(name: str) -> Case:
    """The case of a family: `CASE` of the module that is named like it."""
    case: Case = importlib.import_module(f"tests.families.cases.{name}").CASE
    return case


def published_net(transformer: str, published: Published) -> Any:
    """The class at full size on the meta device: shapes, nothing to hold."""
    with torch.device("meta"):
        return getattr(third_party.library("diffusers"), transformer)(**published.transformer)


# -- pieces that several cases share


def small_vae(levels: int = 3) -> dict[str, Any]:
    """The config of AutoencoderKL and its like: 4 times down unless asked."""
    return {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": CHANNELS,
    }


FOUR_LEVELS = {"block_out_channels": [128, 256, 512, 512]}  # of most published VAEs: 8 times down


def diffusers_part(kind: str, **config: Any) -> Callable[[], Any]:
    """What builds this class of diffusers, with this config."""
    return lambda: getattr(third_party.library("diffusers"), kind)(**config)


def kl_vae(*, levels: int = 3, **config: Any) -> Callable[[], Any]:
    """AutoencoderKL, 4 times down unless asked; config is scaling_factor and whatever differs."""
    return diffusers_part("AutoencoderKL", **{**small_vae(levels), **config})


def flow_scheduler(**config: Any) -> Callable[[], Any]:
    return diffusers_part("FlowMatchEulerDiscreteScheduler", **config)


def as_tokens(image: Tensor) -> Tensor:
    """`write` or `start` of a pipeline that deals in canonical tokens of 2 x 2 cells."""
    return image_to_tokens(image, 2)


def read_packed(
    *text: str, grid: Grid = (4, 6), patch: int = 2, time: str = "timestep"
) -> Callable[[dict[str, Any]], tuple[Tensor, Tensor, Text]]:
    """`read` for a transformer that is called with canonical tokens and these embeddings."""
    return lambda call: (
        tokens_to_image(call["hidden_states"], patch, grid),
        call[time],
        given(call, text),
    )


def given(call: dict[str, Any], names: Sequence[str]) -> Text:
    """Those of a call's embeddings that are there: a mask that hides nothing may be None."""
    return {name: call[name] for name in names if call.get(name) is not None}


def read_map(
    *text: str, time: str = "timestep"
) -> Callable[[dict[str, Any]], tuple[Tensor, Tensor, Text]]:
    """`read` for a transformer that is called with a latent map and these embeddings."""
    return lambda call: (call["hidden_states"], call[time], given(call, text))


def straight_mu(most: float) -> Callable[[Any, int, int], float]:
    """`mu` of a pipeline that calls its module's `calculate_shift`, with this largest shift."""
    return lambda module, num_tokens, steps: float(
        module.calculate_shift(num_tokens, max_shift=most)
    )


def same(image: Tensor) -> Tensor:
    """`write` or `start` of a pipeline that deals in maps."""
    return image


def seeded(build: Callable[[], Any], seed: int) -> Any:
    """What `build` makes from this seed, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def unguided_modular(kind: str, parts: dict[str, Any], *, without: str = "") -> Any:
    """`assemble` of a pipeline of blocks, all but one of them; it makes its guider itself."""
    diffusers = third_party.library("diffusers")
    pipeline_class = getattr(diffusers, kind)
    blocks = getattr(diffusers, pipeline_class.default_blocks_name)()
    if without:
        blocks.sub_blocks.pop(without)
    pipeline = pipeline_class(blocks)
    pipeline.update_components(guider=diffusers.ClassifierFreeGuidance(enabled=False), **parts)
    return pipeline


def save_modular(pipeline: Any, folder: Path) -> None:
    """`save` of a pipeline of blocks."""
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)


def encode_frame(vae: Any, image: Tensor) -> Tensor:
    """`raw_latent` of a video VAE: the picture is one frame."""
    raw: Tensor = vae.encode(image.unsqueeze(2)).latent_dist.mode().squeeze(2)
    return raw


def decode_frame(vae: Any, raw: Tensor) -> Tensor:
    """`decoded` of a video VAE."""
    image: Tensor = vae.decode(raw.unsqueeze(2)).sample.squeeze(2)
    return image

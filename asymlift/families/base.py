"""What is known about one kind of transformer: facts first, code only for what cannot be a fact.

B images, C latent channels, f the VAE's down-scale, q the latent patch; p = f q, d = C q^2,
D = 3 p^2, and C' = 3 f^2: the channels of a pixel image that is read as a latent map.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from asymlift.errors import BadData, BadRecipe, Unavailable
from asymlift.maths.guidance import Renorm
from asymlift.maths.patches import Order

Config = Mapping[str, Any]
# Whatever `run` is told of each sample: embeddings, masks, pictures to go by (references.py).
Text = dict[str, Tensor | list[Tensor]]
Grid = tuple[int, int]  # rows and columns of tokens
TRANSFORMER = "transformer"  # what every pipeline calls the network that draws

# What the tests show of every family on every commit, on tiny models of the real classes.
PROOFS = {
    "lift": "the lifted model computes what the latent one does, float64 and float32",
    "pipeline": "time, sign, ids, masks, prompts and latents are those of the real pipeline",
    "sampling": "the stock pipeline around the lifted model ends on s A z of the latent one",
    "training": "bf16, gradient checkpointing and LoRA, in the engine that finetune runs",
}


@dataclass(frozen=True)
class Geometry:
    """Three numbers of a checkpoint, and every size that follows from them."""

    vae_factor: int  # f: pixels per latent cell
    channels: int  # C: channels of the latent
    patch: int  # q: latent cells per token, along one side

    def __post_init__(self) -> None:
        if self.d > self.D:
            raise BadData(
                f"a latent token has {self.d} numbers but its {self.pixel_patch}-pixel patch only "
                f"{self.D}: a basis needs at least as many pixels as latents"
            )

    @property
    def pixel_patch(self) -> int:
        """Return p: pixels per token, along one side."""
        return self.vae_factor * self.patch

    @property
    def d(self) -> int:
        """Return the width of a latent token."""
        return self.channels * self.patch**2

    @property
    def D(self) -> int:  # noqa: N802
        """Return the width of a pixel token."""
        return 3 * self.pixel_patch**2

    @property
    def pixel_channels(self) -> int:
        """Return C': a pixel token re-read as (C', q, q) looks like a token of such a latent."""
        return 3 * self.vae_factor**2


def picture_first(read: Tensor, text: Text, num_tokens: int) -> Tensor:
    """`last_reads` where the picture's tokens come before all others, or alone."""
    return read[:, :num_tokens]


def picture_last(read: Tensor, text: Text, num_tokens: int) -> Tensor:
    """`last_reads` where they come behind words and padding."""
    return read[:, -num_tokens:]


@dataclass(frozen=True)
class ReferencePictures:
    """Which pictures to go by a family's pipeline takes, and how large they become."""

    least_side: int
    most_aspect: float  # the longer side over the shorter one
    most_pixels: int  # a larger one is made smaller; its middle is then cut to whole tokens


@dataclass(frozen=True)
class Family:
    """One kind of transformer; the same `run` serves the latent model and the pixel model."""

    # -- what it is called
    name: str
    transformer: str  # diffusers class, or my_package.my_module:MyTransformer
    pipelines: tuple[str, ...]  # the diffusers pipelines that drive it

    # -- the maps that the lift changes
    first: str  # path of the map that reads tokens
    last: str  # path of the map that writes them
    final_norm: str | None  # path of what modulates the last map's input; None if no module does
    order_in: Order  # how a patch is flattened on the way in (a convolution is always "c p q") ...
    order_out: Order  # ... and on the way out
    sign: int  # raw output = sign * (eps - x0)
    geometry: Callable[[Config, Config], Geometry]  # (transformer config, VAE config)
    channels: Callable[[int], dict[str, Any]]  # config overrides that make it read c channels

    # -- how it is called
    time: Callable[[Tensor, int], Tensor]  # (tau, number of tokens) -> what the network is told
    run: Callable[[Any, Tensor, Tensor, Text], Tensor]  # (net, map (B, c, h q, w q), time, text)
    encode_latents: Callable[[Any, Tensor], Tensor]  # (VAE, image in [-1, 1]) -> (B, C, h q, w q)
    decode_latents: Callable[[Any, Tensor], Tensor]  # and back, clamped to [-1, 1]

    # -- its prompts: (pipeline, prompts, most words) -> one embedding each -> those of a batch
    encode_prompt: Callable[[Any, Sequence[str], int | None], list[dict[str, Tensor]]]
    collate: Callable[[Sequence[Mapping[str, Tensor]]], Text]
    text_shapes: Callable[
        [Config, int | None], dict[str, tuple[int, ...]]
    ]  # (transformer config, words or the pipeline's own number) -> of one prompt's embedding

    # -- training, sampling, and what users are told
    base_shift: Callable[
        [Config, int], float
    ]  # (scheduler config, tokens) -> the base's time shift
    lora_targets: tuple[str, ...]  # paths of linear maps; `*` stands for anything
    checkpoints: tuple[str, ...]  # published ones, as the hub names them
    tier: Literal["free", "easy"]  # easy: there is a quirk, which the module's docstring tells
    sizes: Geometry | None = None  # of the published checkpoints, or most of them
    unproven: Mapping[str, str] = field(default_factory=dict)  # which of PROOFS is not, and why

    # -- what only some have: further maps, networks and inputs
    also_first: tuple[str, ...] = ()  # further maps that read the same tokens
    # (what `last` reads, text, N) -> (b, N, F): of each token of the picture, in reading order
    last_reads: Callable[[Tensor, Text, int], Tensor] = picture_first
    # (transformer config, rows and columns of tokens) -> why it cannot draw such a picture, or None
    why_not_grid: Callable[[Config, Grid], str | None] = lambda config, grid: None
    renorm: Renorm | None = None  # whose length the pipeline's guidance keeps: `sample.renorm`
    # A second network of this class in the pipeline: guidance goes against it, and `run` gives it
    # no words (see text.without_words). It is lifted with the same basis, and does not train.
    wordless: str | None = None
    # Pictures that it goes by beside the prompt, which `run` finds by `references_of`; or why none.
    references: ReferencePictures | str = "asymlift knows of no such input of its pipeline"

    # -- what only some have: another way to prompts
    prompts: tuple[str, ...] = ("", "a red lighthouse")  # that any checkpoint can embed
    has_text_encoder: bool = True  # else the transformer itself reads tokens, or labels
    text_needs_vae: bool = False  # the pipeline that encodes prompts cannot be made without it
    heavy_text: str | None = None  # why captions are better encoded while training
    # Packages, besides ours, that its pipeline cannot embed prompts without -> what pip installs.
    needs: Mapping[str, str] = field(default_factory=dict)

    # -- what only some have: folders of another kind
    library: str | None = None  # one's own package, whose classes a checkpoint may name too
    idle: tuple[str, ...] = ()  # parts that neither pictures nor prompts need
    own_scheduler: Config | None = None  # of one that its pipeline makes, where a folder has none

    @property
    def first_maps(self) -> tuple[str, ...]:
        """Return the paths of all maps that read tokens."""
        return (self.first, *self.also_first)

    @property
    def networks(self) -> tuple[str, ...]:
        """Return the components of the pipeline that are lifted; the first is the one to train."""
        return (TRANSFORMER,) if self.wordless is None else (TRANSFORMER, self.wordless)


def trained_in_full(family: Family) -> dict[str, str]:
    """Return word -> path of the modules that a recipe may name by a word, all families alike."""
    words = {"first": family.first, "last": family.last, "final_norm": family.final_norm}
    return {word: path for word, path in words.items() if path is not None}


def renorm_rule(family: Family) -> Renorm:
    """Return what guidance keeps the length of; BadRecipe if the pipeline's keeps none."""
    if family.renorm is None:
        raise BadRecipe(
            f"sample.renorm: the guidance of {family.pipelines[0]} keeps no lengths, so asymlift "
            f"knows none to keep for {family.name}; leave it out"
        )
    return family.renorm


def check_needs(family: Family) -> None:
    """Refuse to embed prompts where a package that this takes is missing."""
    for package, source in family.needs.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise Unavailable(
                f"{family.name}: no prompt can be embedded without {package}, which cannot be "
                f"imported ({error}); pip install '{source}'"
            ) from error


def setting(config: Config, key: str) -> Any:
    """Return one value of a checkpoint's config; a missing one is the checkpoint's fault."""
    if key not in config:
        raise BadData(f"the {config.get('_class_name', 'model')} config has no `{key}`")
    return config[key]


def check_grid(name: str, grid: Grid, reason: str | None) -> None:
    """Refuse, in `run` of this family, a picture that it has a reason not to draw."""
    if reason is not None:
        raise BadData(f"{name}: cannot draw a picture of {grid[0]} x {grid[1]} tokens, as {reason}")


def own_patches(
    vae_sizes: Callable[[Config], tuple[int, int]],
) -> Callable[[Config, Config], Geometry]:
    """Return what reads the sizes of a transformer that cuts the latent map up by itself.

    vae_sizes reads the VAE's factor and its channels, f and C.
    """

    def geometry(transformer: Config, vae: Config) -> Geometry:
        sizes = Geometry(*vae_sizes(vae), setting(transformer, "patch_size"))
        return check_channels(sizes, setting(transformer, "in_channels"))

    return geometry


def run_map(net: Any, latent: Tensor, time: Tensor, text: Text) -> Tensor:
    """`run` of a class that reads the map as it is, (B, C, h q, w q), and text by its names."""
    out: Tensor = net(hidden_states=latent, timestep=time, return_dict=False, **text)[0]
    return out


def check_channels(geometry: Geometry, channels: int) -> Geometry:
    """Return the geometry if a transformer with so many channels belongs to this VAE."""
    if channels not in (geometry.channels, geometry.pixel_channels):
        raise BadData(
            f"the transformer reads {channels} channels, but its VAE writes "
            f"{geometry.channels} ({geometry.pixel_channels} once lifted); take both from one model"
        )
    return geometry


def matching_modules(net: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Return the paths of the linear maps that the patterns name, each pattern at least one."""
    linear = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    found: list[str] = []
    for pattern in patterns:
        matches = [path for path in linear if fnmatchcase(path, pattern)]
        if not matches:
            close = get_close_matches(pattern, linear, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise BadRecipe(f"no linear layer of {type(net).__name__} matches {pattern!r}{hint}")
        found += matches
    return list(dict.fromkeys(found))


def plain_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the shift of a scheduler that shifts every resolution alike."""
    return float(setting(scheduler, "shift"))


def shift_from_mu(scheduler: Config, mu: float) -> float:
    """Return the plain shift t -> shift t / (1 + (shift - 1) t) that a dynamic mu amounts to."""
    return mu if scheduler.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def interpolated_shift(scheduler: Config, num_tokens: int) -> float:
    """Return the time shift of a pipeline whose mu is a straight line in the number of tokens.

    The numbers are those of the pipelines' `calculate_shift`, unless the scheduler has its own.
    """
    if not scheduler.get("use_dynamic_shifting", False):
        return plain_shift(scheduler, num_tokens)
    few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return shift_from_mu(scheduler, low + (high - low) * (num_tokens - few) / (many - few))

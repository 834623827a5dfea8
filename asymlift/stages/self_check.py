"""How convert knows that it is right: the two maps read back, and two samplers run side by side.

B images, N = h w tokens, d latent and D pixel token width.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.files import human_bytes
from asymlift.artifacts.safetensors_stream import read_tensor
from asymlift.errors import BadData, Unavailable
from asymlift.families.base import TRANSFORMER, Family, Geometry, Text
from asymlift.families.text import text_to, without_words
from asymlift.maths.lift import lift_last, unlift_first, unlift_last
from asymlift.maths.schedule import sigma_from_tau, sigma_grid, tau_from_sigma
from asymlift.maths.solver import euler
from asymlift.runtime.log import say
from asymlift.runtime.memory import available_memory

Conditioning = Callable[[], Text]  # for a batch of BATCH

MAPS_TOLERANCE = 2e-6  # float32 rounding of the maps and of A; measured 3e-8 to 2e-7
COUPLING_TOLERANCE = 1e-4  # float32 through a whole network and all steps (method, section 4)
BATCH = 2
GRID = (4, 6)  # not square, so that a transposed grid shows
STEPS = 8
FLOOR = 1e-6  # below every sigma of the grid, so that it changes nothing


@dataclass(frozen=True)
class Maps:
    """Relative errors of the two maps, as they stand in the written files: the worst network's."""

    first: float  # W_in' A against W_in
    last: float  # A^T W_out' against W_out, bias included
    outside: float  # the part of W_out' that is outside the range of A


@dataclass(frozen=True)
class Coupling:
    """How closely Euler in pixels followed Euler in latents, in float32."""

    error: float  # relative, in the final image
    psnr: float  # dB, the peak being the largest value of the image
    steps: int


def check_maps(
    base: DiffusersFolder,
    lifted: DiffusersFolder,
    family: Family,
    geometry: Geometry,
    A: Tensor,
    components: Sequence[str] = (TRANSFORMER,),
) -> Maps:
    """Read both maps of each network back from both folders; refuse what differs."""
    errors = [_map_errors(base, lifted, family, geometry, A.double(), name) for name in components]
    maps = Maps(*(_rounded(_worst(of_all)) for of_all in zip(*errors, strict=True)))
    worst = _worst([maps.first, maps.last, maps.outside])
    if not worst <= MAPS_TOLERANCE:
        raise BadData(
            f"{lifted.path}: the maps that were written are not those of the base: relative "
            f"error {worst:.1e}, allowed is {MAPS_TOLERANCE:.0e}. Nothing was kept; is the disk "
            "or the memory faulty?"
        )
    return maps


def _map_errors(
    base: DiffusersFolder,
    lifted: DiffusersFolder,
    family: Family,
    geometry: Geometry,
    A: Tensor,
    component: str,
) -> tuple[float, float, float]:
    """Compare the maps of one network in the latent basis, in float64."""
    q = geometry.patch
    identity = torch.eye(geometry.d, dtype=torch.float64)  # only drops what a lift drops

    places = [_places(folder, component) for folder in (base, lifted)]

    def both(name: str) -> tuple[Tensor, Tensor] | None:
        if name not in places[0]:
            return None  # a map without bias
        old, new = (read_tensor(place[name], name).double() for place in places)
        return old, new

    first, last, outside = [], [], []
    for kind in ("weight", "bias"):
        for path in family.first_maps:
            if pair := both(f"{path}.{kind}"):
                old, new = pair
                if kind == "weight":
                    new = unlift_first(new, A, patch=q, order=family.order_in)
                first.append(_relative(new, old))
        if pair := both(f"{family.last}.{kind}"):
            kept = lift_last(pair[0], identity, patch=q, order=family.order_out)
            back = unlift_last(pair[1], A, patch=q, order=family.order_out)
            last.append(_relative(back, kept))
            again = lift_last(back, A, patch=q, order=family.order_out)
            outside.append(_relative(again, pair[1]))
    return _worst(first), _worst(last), _worst(outside)


def why_not_coupled(
    base: DiffusersFolder,
    family: Family,
    conditioning: Conditioning | None,
    components: Sequence[str] = (TRANSFORMER,),
) -> str | None:
    """The reason why the full check cannot run here, or None."""
    encoders = base.text_nets
    if conditioning is None and family.has_text_encoder:
        if not encoders:
            return "the pipeline has no text encoder"
        missing = [name for name in encoders if not (base.path / name).is_dir()]
        if missing:
            return f"{missing[0]}/ is not in the base folder"
    encoder_bytes = 0 if conditioning else _weight_bytes(base, encoders)
    needed = int(1.2 * max(_float32_bytes(base, components), encoder_bytes)) + (1 << 30)
    available = available_memory()
    if needed > available:
        return (
            f"the full check needs {human_bytes(needed)} of memory, "
            f"{human_bytes(available)} are available"
        )
    return None


@torch.no_grad()
def check_coupling(
    base: DiffusersFolder,
    lifted: Path,
    family: Family,
    geometry: Geometry,
    A: Tensor,
    s: float,
    *,
    components: Sequence[str] = (TRANSFORMER,),
    conditioning: Conditioning | None = None,
    text_length: int | None = None,
) -> Coupling:
    """Sample from the base in latents and from the lifted model in pixels, from matched noise.

    The results must be one image: x = s A z (method, section 4), of a wordless network too. One
    model is loaded at a time.
    """
    from asymlift.model.loading import load_transformer  # diffusers loads only here
    from asymlift.model.pixel_flow import LatentFlow, PixelFlow

    reason = why_not_coupled(base, family, conditioning, components)
    if reason:
        raise Unavailable(f"{base.path}: cannot be verified in full: {reason}. Use --verify maps.")
    device = _device(_float32_bytes(base, components))
    say(
        f"verifying the whole model: {STEPS} Euler steps in latents and in pixels, on {device.type}"
    )
    text = text_to(conditioning() if conditioning else _encode(base, family, text_length), device)
    A, g = A.to(device), torch.Generator().manual_seed(0)
    refused = family.why_not_grid(base.config(TRANSFORMER), GRID)
    grid = GRID if refused is None else (GRID[0], GRID[0])
    noise = torch.randn(BATCH, math.prod(grid), geometry.D, generator=g).to(device)
    # Rounded to float32 first: both networks are told the same time, to the last bit.
    sigma = sigma_from_tau(sigma_grid(STEPS, 1.0, device=device), s).float()
    tau = tau_from_sigma(sigma, s)

    def network(folder: Path, name: str) -> nn.Module:
        loaded = load_transformer(folder, family, dtype=torch.float32, component=name)
        return loaded.to(device)

    def latent_run(name: str, text: Text) -> Tensor:
        flow = LatentFlow(network(base.path, name), family, geometry)
        return euler(lambda z, t: flow(z, t.expand(BATCH), text, grid), noise @ A, tau)

    def pixel_run(name: str, text: Text) -> Tensor:
        flow = PixelFlow(network(lifted, name), family, geometry, A, s)
        return euler(lambda x, t: flow(x, t.expand(BATCH), text, grid, floor=FLOOR), noise, sigma)

    errors, psnrs = [], []
    with _full_float32():
        for name in components:
            seen = without_words(text) if name == family.wordless else text
            expected = s * latent_run(name, seen) @ A.T
            gc.collect()
            image = pixel_run(name, seen)
            gc.collect()
            error, rms = _relative(image, expected), (image - expected).square().mean().sqrt()
            psnr = 20 * math.log10(float(expected.abs().max() / rms.clamp(min=1e-30)))
            if not error <= COUPLING_TOLERANCE:
                raise BadData(
                    f"{base.folder(name)}: sampling in pixels does not follow sampling in latents: "
                    f"relative error {error:.1e} ({psnr:.0f} dB), allowed is "
                    f"{COUPLING_TOLERANCE:.0e}. Nothing was kept; does family {family.name} "
                    "describe this checkpoint?"
                )
            errors.append(error)
            psnrs.append(psnr)
    return Coupling(_rounded(max(errors)), round(min(psnrs), 1), STEPS)


def _encode(base: DiffusersFolder, family: Family, text_length: int | None) -> Text:
    from asymlift.model.loading import embed_prompts, load_pipeline, text_parts

    pipeline = load_pipeline(base.path, text_parts(base, family), family=family)
    text = family.collate(embed_prompts(family, pipeline, family.prompts, text_length))
    del pipeline
    gc.collect()
    return text


def _places(folder: DiffusersFolder, component: str) -> dict[str, Path]:
    headers = folder.headers(component)
    return {name: path for path, header in headers.items() for name in header.tensors}


def _relative(value: Tensor, expected: Tensor) -> float:
    value, expected = value.double(), expected.double()
    return float((value - expected).norm() / expected.norm().clamp(min=1e-30))


def _worst(errors: Sequence[float]) -> float:
    """The largest, or NaN if any is: `max` may pass over that."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def _rounded(error: float) -> float:
    return float(f"{error:.2g}")


def _float32_bytes(base: DiffusersFolder, components: Sequence[str]) -> int:
    """Of the largest network."""

    def size(component: str) -> int:
        headers = base.headers(component).values()
        return 4 * sum(math.prod(info.shape) for h in headers for info in h.tensors.values())

    return max(map(size, components))


def _weight_bytes(base: DiffusersFolder, components: list[str]) -> int:
    return sum(path.stat().st_size for name in components for path in base.weight_files(name))


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TensorFloat32, which a GPU takes for convolutions by default: it has 10 bits, not 23."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _device(model_bytes: int) -> torch.device:
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * model_bytes + (1 << 30):
        return torch.device("cuda")
    return torch.device("cpu")

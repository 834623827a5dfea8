"""A transformer as a velocity field over tokens: the latent model, and the same model in pixels.

B images, N = h w tokens, d latent and D pixel token width, p pixel and q latent patch.
Pictures to go by are part of the text, without noise, and may have any sizes: latent maps
(B, C, h q, w q) for the latent model, pictures (B, 3, h p, w p) in its colours for the pixel model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from asymlift.families.base import Family, Geometry, Text
from asymlift.families.references import reference_rule, references_of, with_references
from asymlift.maths.asymmetric import calibrate, clean_input, recover_velocity
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.model.float32_maps import float32_maps

Grid = tuple[int, int]


class LatentFlow(nn.Module):
    """The base model: latent tokens in, their velocity out."""

    def __init__(
        self,
        net: nn.Module,
        family: Family,
        geometry: Geometry,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.net, self.family, self.geometry, self.precision = net, family, geometry, precision
        if precision is not None:
            float32_maps(net, family)

    def forward(self, z_t: Tensor, tau: Tensor, text: Text, grid: Grid) -> Tensor:
        """Return v = eps - z0, (B, N, d); tau is (B,)."""
        return _velocity(self, z_t, tau, text, grid)


class PixelFlow(nn.Module):
    """The converted model: pixel tokens in, their velocity out.

    `net` is the stock class with C' channels. It is told that a pixel token, re-read as
    (C', q, q), is a latent one, so it is called exactly as the base model is.
    """

    A: Tensor

    def __init__(
        self,
        net: nn.Module,
        family: Family,
        geometry: Geometry,
        A: Tensor,
        s: float,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.net, self.family, self.geometry, self.precision = net, family, geometry, precision
        self.register_buffer("A", A, persistent=False)  # (D, d); saved once, beside the weights
        self.s = float(s)
        if precision is not None:
            float32_maps(net, family)

    def forward(
        self, x_t: Tensor, sigma: Tensor, text: Text, grid: Grid, *, floor: float
    ) -> Tensor:
        """Return u = eps - x0, (B, N, D), in the dtype of A: float32. sigma is (B,)."""
        return self.recover(self.predict(x_t, sigma, text, grid), x_t, sigma, floor=floor)

    def predict(self, x_t: Tensor, sigma: Tensor, text: Text, grid: Grid) -> Tensor:
        """Return u_a, what the network itself says, (B, N, D), in the dtype of A."""
        assert self.A.dtype in (torch.float32, torch.float64), f"A was rounded to {self.A.dtype}"
        with torch.autocast(x_t.device.type, enabled=False):
            k, tau = calibrate(sigma.to(self.A.dtype).view(-1, 1, 1), self.s)
            tokens = k * x_t.to(self.A.dtype)
            text = with_references(text, [self._clean_map(one) for one in references_of(text)])
            return _velocity(self, tokens, tau.flatten(), text, grid).to(self.A.dtype)

    def _clean_map(self, picture: Tensor) -> Tensor:
        """(B, 3, h p, w p) -> (B, C', h q, w q), as the network reads a picture to go by."""
        p, q = self.geometry.pixel_patch, self.geometry.patch
        grid = picture.shape[-2] // p, picture.shape[-1] // p
        tokens = clean_input(image_to_tokens(picture.to(self.A.dtype), p), self.s)
        return tokens_to_image(tokens, q, grid)

    def recover(self, u_a: Tensor, x_t: Tensor, sigma: Tensor, *, floor: float) -> Tensor:
        """Return the velocity u = eps - x0 that this u_a stands for."""
        with torch.autocast(x_t.device.type, enabled=False):
            level = sigma.to(self.A.dtype).view(-1, 1, 1)
            return recover_velocity(u_a, x_t.to(self.A.dtype), self.A, self.s, level, floor=floor)


def _velocity(flow: Any, tokens: Tensor, tau: Tensor, text: Text, grid: Grid) -> Tensor:
    """Call the network on canonical tokens and return its velocity as canonical tokens."""
    family, patch = flow.family, flow.geometry.patch
    if references_of(text):
        reference_rule(family)  # it must not be silently ignored
    image = tokens_to_image(tokens, patch, grid)  # (B, C or C', h q, w q)
    time = family.time(tau, tokens.shape[1])
    if flow.precision is None:
        dtype = next(flow.net.parameters()).dtype
        image, text = image.to(dtype), _cast(text, dtype)
    with torch.autocast(image.device.type, flow.precision, enabled=flow.precision is not None):
        raw = family.run(flow.net, image, time, text)
    found = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
    assert found == image.shape, (
        f"run of {family.name} returned {found}, not a map (B, c, h, w) of {tuple(image.shape)}"
    )
    return image_to_tokens(family.sign * raw, patch)


def _cast(text: Text, dtype: torch.dtype) -> Text:
    """Cast embeddings, wherever they come from, to what the network computes in."""

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    return {k: cast(v) if isinstance(v, Tensor) else [cast(t) for t in v] for k, v in text.items()}

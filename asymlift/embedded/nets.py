"""Two small classifiers of scenes: one measures perceptual distance, the other judges samples.

They differ in width, seed and data, and the judge never enters a loss.

Shapes: B images, H x W pixels in [-1, 1]; stage maps shrink from H/2 to H/16.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from asymlift.embedded.scenes import LABELS


class FeatureNet(nn.Module):
    """Classify a scene; the maps inside are the features."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        self.stages = nn.ModuleList(
            _stage(before, after, first=before == 3)
            for before, after in zip((3, *widths), widths, strict=False)
        )
        num_pooled = sum(widths[1:]) + widths[-1]
        self.heads = nn.ModuleDict({k: nn.Linear(num_pooled, n) for k, n in LABELS.items()})

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the map after every stage."""
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return maps

    def pooled(self, image: Tensor) -> Tensor:
        """Return one vector per image, (B, C): means of the later maps, maxima of the last."""
        maps = self.features(image)
        means = [m.mean((2, 3)) for m in maps[1:]]
        return torch.cat([*means, maps[-1].amax((2, 3))], dim=1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        pooled = self.pooled(image)
        return {name: head(pooled) for name, head in self.heads.items()}

    def save(self, path: Path) -> None:
        half = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        save_file(half, path, metadata={"widths": json.dumps(self.widths)})
        path.chmod(0o644)

    @classmethod
    def load(cls, path: Path) -> "FeatureNet":
        """Return the net in float32, in eval mode, its weights frozen."""
        with safe_open(path, framework="pt") as file:
            net = cls(tuple(json.loads(file.metadata()["widths"])))
        net.load_state_dict(load_file(path))
        return net.eval().requires_grad_(False)


def perceptual_map(net: FeatureNet, image: Tensor, target: Tensor) -> Tensor:
    """Return the LPIPS-style distance at every pixel, (B, 1, H, W); no gradient to target."""
    with torch.no_grad():
        wanted = [_unit(m) for m in net.features(target)]
    total = torch.zeros_like(image[:, :1])
    for got, want in zip(net.features(image), wanted, strict=True):
        apart = (_unit(got) - want).square().sum(1, keepdim=True)
        total = total + functional.interpolate(apart, size=image.shape[-2:], mode="bilinear")
    return total / len(wanted)


def _unit(features: Tensor) -> Tensor:
    return features * (features.square().sum(1, keepdim=True) + 1e-6).rsqrt()


def _stage(before: int, after: int, *, first: bool) -> nn.Sequential:
    # The first stage shrinks in its second convolution: one full-resolution look at the pixels.
    strides = (1, 2) if first else (2, 1)
    return nn.Sequential(
        nn.Conv2d(before, after, 3, strides[0], 1),
        nn.GroupNorm(4, after),
        nn.SiLU(),
        nn.Conv2d(after, after, 3, strides[1], 1),
        nn.GroupNorm(4, after),
        nn.SiLU(),
    )

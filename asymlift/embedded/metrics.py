"""How good a set of sampled scenes is, against real ones.

Shapes: n images, C features, S the side in pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from asymlift.embedded.nets import FeatureNet

BATCH = 256
SPECTRUM_FLOOR = 1e-6  # power; far below what an 8-bit picture carries


@dataclass(frozen=True)
class Scores:
    """The judgement on one set of images."""

    frechet: float  # 0 is identical; has a floor that falls with n: compare at equal n
    accuracy: float  # share of labels the judge reads off the picture, mean over the five
    accuracy_of: dict[str, float]  # the same for each label
    high_frequency: float  # power above 0.3 of the Nyquist rate, real images = 1
    spectrum_distance: float  # mean |dB| between the two radial spectra, same range


class Measure:
    """Scores sets of images against a reference set of real ones, which no model has seen."""

    def __init__(self, net: FeatureNet, reference: Tensor) -> None:
        """reference (n, 3, S, S) in [0, 1]."""
        self.net = net
        features = self._features(reference)
        self.mean, self.std = features.mean(0), features.std(0) + 1e-4
        self.features = (features - self.mean) / self.std
        self.spectrum = radial_spectrum(reference)

    def __call__(self, image: Tensor, labels: Tensor) -> Scores:
        """Score images (n, 3, S, S) in [0, 1], sampled from the captions of these labels (n, 5)."""
        image = image.clamp(0, 1)
        features = self._features(image)
        right = {
            name: float((head(features).argmax(1) == labels[:, i]).float().mean())
            for i, (name, head) in enumerate(self.net.heads.items())
        }
        spectrum = radial_spectrum(image)
        high = slice(high_band(image.shape[-1]), None)
        ratio = (spectrum[high] + SPECTRUM_FLOOR) / (self.spectrum[high] + SPECTRUM_FLOOR)
        return Scores(
            frechet=frechet_distance((features - self.mean) / self.std, self.features),
            accuracy=sum(right.values()) / len(right),
            accuracy_of=right,
            high_frequency=float(spectrum[high].sum() / self.spectrum[high].sum()),
            spectrum_distance=float((10 * ratio.log10()).abs().mean()),
        )

    @torch.no_grad()
    def _features(self, image: Tensor) -> Tensor:
        return torch.cat([self.net.pooled(part * 2 - 1) for part in torch.split(image, BATCH)])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of features (n, C)."""
    a, b = a.double(), b.double()
    apart = a.mean(0) - b.mean(0)
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # tr (cov_a cov_b)^(1/2), through the symmetric matrix with the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(apart @ apart + cov_a.trace() + cov_b.trace() - 2 * cross)


def radial_spectrum(image: Tensor) -> Tensor:
    """Return the mean power of grey images at each radius, (S / 2 + 1,); corners go to the last."""
    grey = image.mean(1)
    grey = grey - grey.mean((1, 2), keepdim=True)
    size = grey.shape[-1]
    power = torch.fft.fft2(grey).abs().square().mean(0) / size**2
    frequency = torch.fft.fftfreq(size) * size
    radius = torch.hypot(frequency[:, None], frequency).round().long().clamp(max=size // 2)
    sums = torch.zeros(size // 2 + 1).index_add(0, radius.flatten(), power.flatten())
    return sums / radius.flatten().bincount()


def high_band(size: int) -> int:
    """Return the first radius that counts as high frequency: 5 of 16 at size 32."""
    return size * 5 // 32


def high_frequency_ratio(image: Tensor, real: Tensor) -> float:
    """Return the high-frequency power of images over that of the real ones they should match."""
    high = slice(high_band(image.shape[-1]), None)
    return float(radial_spectrum(image)[high].sum() / radial_spectrum(real)[high].sum())

"""The perceptual distance: the lpips package, spatial, with its backbone from a local file."""

import re
import warnings
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from asymlift.artifacts.files import sha256_file
from asymlift.errors import BadData, Unavailable
from asymlift.runtime import third_party

BACKBONES = {  # lpips' name -> the file that torchvision publishes
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


class Perceptual(Protocol):
    """Images (B, 3, H, W) in [-1, 1] -> a map of distances (B, 1, H, W)."""

    def __call__(self, image: Tensor, target: Tensor) -> Tensor: ...


class Lpips(nn.Module):
    """LPIPS with frozen weights."""

    def __init__(self, net: str) -> None:
        super().__init__()
        lpips = third_party.library("lpips")
        with warnings.catch_warnings():  # it calls torchvision the old way
            warnings.simplefilter("ignore", UserWarning)
            self.distance = lpips.LPIPS(net=net, spatial=True, pnet_rand=True, verbose=False)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        distance: Tensor = self.distance(image, target)
        return distance


def load_lpips(net: str, weights: str | None, *, seed: int) -> Lpips:
    """`weights`: a file in torchvision's format, `random`, or None for torch hub's cache."""
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Lpips(net)
    path = backbone_path(net, weights)
    if not path.is_file():
        raise Unavailable(
            f"{path}: the {net} backbone of LPIPS is not there; download torchvision's "
            f"{BACKBONES[net]}, and put it there or name it in finetune.loss.perceptual.weights"
        )
    model = Lpips(net)
    load_backbone(model, path)
    return model


def backbone_path(net: str, weights: str | None) -> Path:
    """The file that is named, or where torch hub would have put it."""
    return Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net]


def load_backbone(model: Lpips, path: Path) -> None:
    """Fill the backbone from torchvision's state dict (`features.N...`); every tensor must fit."""
    check_published_hash(path)
    tensors = read_state(path)
    inner = model.distance.net
    wanted = {name: re.sub(r"^slice\d+\.", "features.", name) for name in inner.state_dict()}
    missing = [source for source in wanted.values() if source not in tensors]
    if missing:
        raise BadData(f"{path}: not a torchvision backbone for LPIPS: {missing[0]} is missing")
    try:
        inner.load_state_dict({name: tensors[source] for name, source in wanted.items()})
    except RuntimeError as error:
        raise BadData(f"{path}: not this backbone: {str(error).splitlines()[-1].strip()}") from None


def read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:  # torchvision publishes .pth; this reads tensors and runs no code
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BadData(f"{path}: cannot be read as weights ({first_sentence(error)})") from None
    if not isinstance(state, dict):
        raise BadData(f"{path}: cannot be read as weights (it holds a {type(state).__name__})")
    return state


def first_sentence(error: Exception) -> str:
    """What went wrong; torch goes on about how to read the file all the same."""
    said = str(error).strip()
    return said.splitlines()[0].split(". ")[0] if said else "it ends early"


def check_published_hash(path: Path) -> None:
    """torchvision's file names end with the first digits of their sha256."""
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named is None:
        return
    digest = sha256_file(path)
    if not digest.startswith(named[1]):
        raise BadData(f"{path}: its name promises sha256 {named[1]}..., it has {digest[:8]}...")

"""LPIPS is the lpips package's own, with its backbone from a file on this machine."""

import hashlib
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from asymlift.errors import BadData, Unavailable
from asymlift.model.perceptual import BACKBONES, Lpips, load_lpips
from asymlift.runtime import third_party


def pictures(count: int = 2, size: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, count, 3, size, size, generator=g) * 2 - 1
    return one, other


def torchvision_net(net: str, seed: int = 1):
    """What torchvision publishes, with random weights."""
    third_party.prepare()
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if net == "vgg":  # the classifier has nine tenths of the weights, and is not used
            return torch.nn.ModuleDict({"features": models.vgg.make_layers(models.vgg.cfgs["D"])})
        return models.squeezenet1_1(weights=None)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vgg.pth"
    torch.save(torchvision_net("vgg").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vgg(vgg_file) -> Lpips:
    return load_lpips("vgg", str(vgg_file), seed=0)


@pytest.fixture
def squeeze_state() -> dict[str, Tensor]:
    return dict(torchvision_net("squeeze").state_dict())


def test_vgg_from_torchvisions_file_is_what_lpips_computes_itself(vgg, monkeypatch):
    """lpips' own loading, which would download, is given the same network."""
    from lpips import LPIPS, pretrained_networks

    class Published(torch.nn.Module):
        features = torchvision_net("vgg")["features"]

    asked = []
    monkeypatch.setattr(
        pretrained_networks.tv, "vgg16", lambda **given: asked.append(given) or Published()
    )
    theirs = LPIPS(net="vgg", spatial=True, verbose=False)
    assert asked  # it would have been torchvision's pretrained one
    one, other = pictures()
    with torch.no_grad():
        ours, wanted = vgg(one, other), theirs(one, other)
        assert ours.shape == (2, 1, 64, 64)
        assert torch.equal(ours, wanted)
        assert float(ours.std()) > 1e-4  # a map, not a constant


def test_equal_pictures_are_at_distance_zero_and_others_are_not(vgg):
    one, other = pictures()
    with torch.no_grad():
        assert not vgg(one, one).any()
        assert (vgg(one, other) > 0).all()


def test_the_gradient_reaches_the_picture_and_no_weight(vgg):
    one, other = pictures(1)
    one.requires_grad_()
    vgg(one, other).mean().backward()
    assert one.grad.isfinite().all() and one.grad.any(dim=1).all()
    assert not vgg.training
    assert all(not p.requires_grad and p.grad is None for p in vgg.parameters())


def test_a_place_where_nothing_fires_gives_a_finite_gradient():
    """lpips divides by the norm of the features, whose root has no slope at zero."""
    model = load_lpips("squeeze", "random", seed=0)
    grey = model.distance.scaling_layer.shift.expand(1, 3, 64, 64).clone()  # zero once scaled
    with torch.no_grad():
        assert any(not out.any(dim=1).all() for out in model.distance.net(torch.zeros_like(grey)))
    grey.requires_grad_()
    model(grey, pictures(1)[0]).mean().backward()
    assert grey.grad.isfinite().all()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_any_backbone_and_either_format_load_exactly(squeeze_state, tmp_path, suffix):
    path = tmp_path / f"backbone{suffix}"
    (torch.save if suffix == ".pth" else save_file)(squeeze_state, path)
    model = load_lpips("squeeze", str(path), seed=0)
    loaded = model.distance.net.state_dict()
    assert loaded
    for name, tensor in loaded.items():
        assert torch.equal(tensor, squeeze_state["features." + name.partition(".")[2]]), name


def test_random_weights_follow_the_seed_and_disturb_nobody():
    state = torch.random.get_rng_state()
    first, again, other = (load_lpips("squeeze", "random", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    one, two = pictures(1)
    with torch.no_grad():
        assert torch.equal(first(one, two), again(one, two))
        assert not torch.equal(first(one, two), other(one, two))


def test_loading_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lpips("squeeze", "random", seed=0)


def test_a_missing_backbone_says_what_to_download_and_where_it_goes(tmp_path, monkeypatch):
    with pytest.raises(Unavailable) as caught:
        load_lpips("vgg", str(tmp_path / "none.pth"), seed=0)
    assert str(caught.value) == (
        f"{tmp_path / 'none.pth'}: the vgg backbone of LPIPS is not there; download torchvision's "
        "vgg16-397923af.pth, and put it there or name it in finetune.loss.perceptual.weights"
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(Unavailable) as caught:
        load_lpips("alex", None, seed=0)
    assert str(tmp_path / "hub" / "checkpoints" / BACKBONES["alex"]) in str(caught.value)


def test_torch_hubs_cache_is_where_it_is_looked_for(squeeze_state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    made = tmp_path / "made.pth"
    torch.save(squeeze_state, made)
    named = f"squeezenet1_1-{hashlib.sha256(made.read_bytes()).hexdigest()[:8]}.pth"
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    made.rename(tmp_path / "hub" / "checkpoints" / named)
    monkeypatch.setitem(BACKBONES, "squeeze", named)
    load_lpips("squeeze", None, seed=0)  # its name keeps its promise


def test_a_file_whose_name_promises_another_hash_is_refused(squeeze_state, tmp_path):
    path = tmp_path / "squeezenet1_1-b8a52dc0.pth"
    torch.save(squeeze_state, path)
    with pytest.raises(BadData) as caught:
        load_lpips("squeeze", str(path), seed=0)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(caught.value) == (
        f"{path}: its name promises sha256 b8a52dc0..., it has {digest[:8]}..."
    )


def refused(path: Path, net: str = "squeeze") -> str:
    with pytest.raises(BadData) as caught:
        load_lpips(net, str(path), seed=0)
    return str(caught.value)


def test_a_backbone_without_one_of_its_tensors_is_refused(squeeze_state, tmp_path):
    del squeeze_state["features.3.squeeze.weight"]
    path = tmp_path / "w.pth"
    torch.save(squeeze_state, path)
    assert refused(path) == (
        f"{path}: not a torchvision backbone for LPIPS: features.3.squeeze.weight is missing"
    )


def test_a_backbone_of_other_shapes_is_refused(squeeze_state, tmp_path):
    squeeze_state["features.0.bias"] = torch.zeros(3)
    path = tmp_path / "w.pth"
    torch.save(squeeze_state, path)
    said = refused(path)
    assert said.startswith(f"{path}: not this backbone: size mismatch for slice1.0.bias")


def test_another_backbone_is_refused(vgg_file):
    assert "is missing" in refused(vgg_file)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(squeeze_state, tmp_path):
    path, proof = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({**squeeze_state, "extra": Payload(proof)}, path)
    assert refused(path) == f"{path}: cannot be read as weights (Weights only load failed)"
    assert not proof.exists()
    torch.load(path, weights_only=False)  # it would have
    assert proof.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_weights_is_refused(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    for content in (b"", b"<html>404</html>"):
        path.write_bytes(content)
        said = refused(path)
        assert said.startswith(f"{path}: cannot be read as weights (") and "\n" not in said


def test_a_file_that_holds_one_tensor_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(torch.zeros(3), path)
    assert refused(path) == f"{path}: cannot be read as weights (it holds a Tensor)"

"""Importing the libraries: torchvision's operators are declared only where they are missing."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from asymlift.runtime import torchvision_shim

PROBE = """
from asymlift.runtime import third_party
third_party.prepare()
third_party.prepare()
import torchvision
from torchvision.models import vgg16
diffusers = third_party.library("diffusers")
assert diffusers.Flux2Transformer2DModel and third_party.library("lpips").LPIPS
diffusers.loaders.LoraLoaderMixin()
"""


def test_everything_imports_quietly():
    """In a fresh process, as a stage does it; works with and without torchvision's operators."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


@pytest.fixture
def fresh(monkeypatch):
    """As if nothing had been imported, and a library that records what is declared."""
    declared: list[str] = []
    library = SimpleNamespace(define=declared.append)
    monkeypatch.setattr(torchvision_shim, "_declared", [])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torch.library, "Library", lambda name, kind: library)
    return declared


def test_missing_operators_are_declared_once(fresh, monkeypatch):
    monkeypatch.setattr(torchvision_shim, "_own_operators_load", lambda: False)
    assert torchvision_shim.declare_missing_schemas()
    assert torchvision_shim.declare_missing_schemas()
    assert [schema.split("(")[0] for schema in fresh] == ["nms", "qnms"]


def test_a_torchvision_with_its_operators_is_left_alone(fresh, monkeypatch):
    monkeypatch.setattr(torchvision_shim, "_own_operators_load", lambda: True)
    assert not torchvision_shim.declare_missing_schemas()
    assert fresh == []


def test_without_torchvision_nothing_is_declared(fresh, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not torchvision_shim.declare_missing_schemas()
    assert fresh == []


@pytest.mark.parametrize("loads", [True, False])
def test_its_library_is_tried_as_torchvision_will_try_it(fresh, monkeypatch, tmp_path, loads):
    (tmp_path / "_C.so").touch()
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    def load_library(path: str) -> None:
        assert path == str(tmp_path / "_C.so")
        if not loads:
            raise OSError("libcudart.so.13: cannot open shared object file")

    operators = SimpleNamespace(load_library=load_library, torchvision=SimpleNamespace(nms=1))
    monkeypatch.setattr(torch, "ops", operators)
    assert torchvision_shim.declare_missing_schemas() is not loads
    assert bool(fresh) is not loads

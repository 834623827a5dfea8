"""What trains comes from the files to the device, and in float32 it is only there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from asymlift.artifacts.lifted_folder import Lifted
from asymlift.model.loading import load_transformer
from asymlift.recipe import check_recipe
from asymlift.stages.finetune.model import build_step
from asymlift.stages.locate import lifted_path
from asymlift.stages.plan.model import blueprint_of, color_of
from benchmarks.plan_memory import MODELS, recipe_values, write_lifted

SMALL = {**MODELS["flux2"], "num_layers": 1, "num_single_layers": 1}
FLOW = {"kind": "flow", "perceptual": None}
COPY = {"reference": "copy", "perceptual": None}
BFLOAT16, CPU = torch.bfloat16, torch.device("cpu")


class Widened(TorchDispatchMode):
    """Counts the numbers that become float32 on the host."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        copies = func is torch.ops.aten._to_copy.default and made.device == CPU
        if copies and (args[0].dtype, made.dtype) == (BFLOAT16, torch.float32):
            self.numbers += made.numel()
        return made


def built(tmp_path, precision, device, **changes):
    write_lifted(tmp_path, "flux2", SMALL)
    changes = {"loss": FLOW, **changes}
    recipe = check_recipe(recipe_values(tmp_path, changes, 1), "small recipe")
    found = blueprint_of(recipe)
    family, geometry = found.family, found.geometry
    A = torch.linalg.qr(torch.randn(geometry.D, geometry.d))[0]
    folder = lifted_path(recipe)
    lifted = Lifted(folder, family.name, geometry, A, 1.0, color_of(recipe), {}, {})
    with Widened() as widened:
        step, _ = build_step(recipe.finetune, lifted, family, precision, torch.device(device))
    return step, load_transformer(folder, family, dtype=torch.float32), widened.numbers


@pytest.mark.parametrize("precision", [BFLOAT16, None], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("loss", [FLOW, COPY], ids=["alone", "with a reference"])
def test_a_host_holds_no_float32_copy_of_what_trains_in_full(tmp_path, precision, loss):
    """A device without memory stands for a GPU."""
    step, net, widened = built(tmp_path, precision, "meta", train="full", loss=loss)
    assert {p.device.type for p in step.parameters()} == {"meta"}
    assert {p.dtype for p in step.student.parameters()} == {torch.float32}
    assert widened == 0 < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("precision", [BFLOAT16, None], ids=["bfloat16", "float32"])
def test_what_trains_in_full_begins_as_it_is_stored(tmp_path, precision):
    step, net, _ = built(tmp_path, precision, "cpu", train="full")
    found = dict(step.student.net.named_parameters())
    assert found.keys() == dict(net.named_parameters()).keys()
    for name, stored in net.named_parameters():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], stored)


def test_in_float32_what_is_frozen_beside_adapters_is_widened_too(tmp_path):
    step, _, _ = built(tmp_path, None, "cpu")
    assert {p.dtype for p in step.parameters()} == {torch.float32}

"""What a run trained goes back into its network whole, or not at all."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from asymlift.errors import BadData
from asymlift.model.trained_weights import apply_trained
from asymlift.runtime import third_party


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.trunk = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        for layer in self.trunk:
            x = x + torch.tanh(layer(x))
        return self.last(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def adapted(net, rank=3, alpha=5.0):
    """The net with adapters, and its adapters' tensors under the names of a checkpoint."""
    peft = third_party.library("peft")
    net = copy.deepcopy(net)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=r"trunk\.\d")
    peft.inject_adapter_in_model(config, net)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    tensors = {
        name.replace(".default", ""): p.detach()
        for name, p in net.named_parameters()
        if "lora" in name
    }
    return net, tensors


@torch.no_grad()
def test_a_merged_adapter_computes_what_peft_computes(net):
    with_peft, tensors = adapted(net)
    assert len(tensors) == 6

    apply_trained(net, tensors, {"rank": 3, "alpha": 5.0})

    x = torch.randn(10, 6)
    assert_close(net(x), with_peft.eval()(x), rtol=0, atol=2e-6)


@torch.no_grad()
def test_an_adapted_weight_keeps_its_dtype_and_is_rounded_once(net):
    _, tensors = adapted(net)
    weight = net.trunk[1].weight.detach().bfloat16()
    net.trunk.bfloat16()

    apply_trained(net, tensors, {"rank": 3, "alpha": 5.0})

    up, down = tensors["trunk.1.lora_B.weight"], tensors["trunk.1.lora_A.weight"]
    assert net.trunk[1].weight.dtype == torch.bfloat16
    assert torch.equal(net.trunk[1].weight, (weight.float() + 5 / 3 * up @ down).bfloat16())


@torch.no_grad()
def test_what_was_trained_whole_stays_in_float32(net):
    net.bfloat16()
    trained = {"last.weight": torch.randn(4, 8), "last.bias": torch.randn(4)}

    apply_trained(net, trained)

    assert_close(net.last.weight.detach(), trained["last.weight"], rtol=0, atol=0)
    assert net.last.bias.dtype == torch.float32
    assert net.first.weight.dtype == torch.bfloat16


LORA = {"rank": 3, "alpha": 5.0}


@pytest.mark.parametrize(
    ("change", "lora", "message"),
    [
        (lambda t: t | {"middle.weight": torch.zeros(2)}, LORA, "does not have: middle.weight"),
        (
            lambda t: t | {"last.weight": torch.zeros(4, 9)},
            LORA,
            "is [4, 9], this model needs [4, 8]",
        ),
        (
            lambda t: dict(list(t.items())[1:]),
            LORA,
            "half an adapter: trunk.0.lora_A.weight is missing",
        ),
        (lambda t: t, None, "without their rank and alpha"),
        (lambda t: t, {"rank": 4, "alpha": 5.0}, "is [3, 8], this model needs [4, 8]"),
        (lambda t: t | {"trunk.0.weight": torch.zeros(8, 8)}, LORA, "both whole and through"),
        (lambda t: {f"blocks.{k}": v for k, v in t.items()}, LORA, "trained from another model?"),
    ],
)
def test_a_tensor_without_a_place_is_refused_and_nothing_changes(net, change, lora, message):
    _, tensors = adapted(net)
    before = copy.deepcopy(net.state_dict())

    with pytest.raises(BadData) as refused:
        apply_trained(net, change(tensors), lora)

    assert message in str(refused.value)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())

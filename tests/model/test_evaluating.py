"""Looking at a model changes nothing of it."""

import pytest
import torch
from torch import nn

from asymlift.model.evaluating import evaluating


def test_dropout_is_off_inside_and_every_modules_own_mode_comes_back():
    net = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)))
    net.eval()
    net[1][0].train()  # as adapters are in a frozen model
    before = [part.training for part in net.modules()]
    x = torch.randn(8, 4)
    with pytest.raises(RuntimeError), evaluating(net):
        assert torch.equal(net(x), net(x))
        raise RuntimeError
    assert [part.training for part in net.modules()] == before == [False, False, False, True, False]
    assert not torch.equal(net(x), net(x))

"""Where the shares of ZeRO-3 lie; that they are right is proved with engines."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from asymlift.runtime.dist import Ranks
from asymlift.runtime.layout import find_sharded
from asymlift.runtime.parameters import Trainable


@pytest.mark.parametrize("numbers, world", [(3, 8), (8, 4), (7, 2), (1, 3)])
def test_shares_cover_a_tensor_once_and_stay_inside_it(numbers, world):
    """Also with more ranks than numbers: the last ones hold padding, and read nothing."""
    parameter = nn.Parameter(torch.zeros(numbers))
    parameter.ds_numel, parameter.ds_shape = numbers, (numbers,)
    share = -(-numbers // world)
    zero = SimpleNamespace(
        fp16_groups=[[parameter]],
        fp32_partitioned_groups_flat=["flat"],
        grad_position={0: (0, 5, share)},
        get_param_id=lambda p: 0,
    )
    covered = []
    for rank in range(world):
        ranks = Ranks(rank, world, rank)
        [(_, [(_, piece)])] = find_sharded(zero, Trainable({"a": parameter}), ranks)
        assert piece.start == 5 and 0 <= piece.count <= share
        assert 0 <= piece.in_whole.start <= piece.in_whole.stop <= numbers
        covered += range(numbers)[piece.in_whole]
    assert covered == list(range(numbers))

"""What a step takes, counted on fake tensors, is what it takes."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from asymlift.families import FAMILIES
from asymlift.model.checkpointing import checkpoint_blocks
from asymlift.model.footprint import KeepReal, LiveBytes, make_fake, measure_step
from asymlift.model.like_cuda import LikeCuda
from asymlift.model.trainable import Adapters, train_parts
from asymlift.model.training_step import Batch, LossConstants, TrainingStep
from tests.families.case import case_of
from tests.tiny import KINDS, lifted_pair, tiny_text

MIB = 2**20


def test_bytes_are_counted_while_a_storage_lives():
    with LiveBytes() as live:
        x = torch.ones(MIB)  # 4 MiB
        y = x.view(2, -1)[0]  # the same storage
        z = torch.cat([x, x])
        assert (live.live, live.peak) == (12 * MIB, 12 * MIB)
        del z
        assert (live.live, live.peak) == (4 * MIB, 12 * MIB)
        del x
        assert live.live == 4 * MIB
        del y
        assert live.live == 0


def test_what_autograd_saves_is_counted_until_it_is_used():
    with LiveBytes() as live:
        x = torch.ones(MIB, requires_grad=True)
        y = x.exp().exp()  # each keeps its result
        assert live.live == 12 * MIB
        y.sum().backward()
        del y
        assert live.live == 8 * MIB  # x and its gradient


def tiny_step(name, *, real=True, precision=torch.bfloat16, checkpointing=False):
    """A step on tiny weights, or on fake ones of the same kind."""
    pair = lifted_pair(name, dtype=torch.float32, precision=precision)
    train_parts(
        pair.pixel.net,
        FAMILIES[name],
        adapters=Adapters(4, 4.0, 0.1, FAMILIES[name].lora_targets),
        modules=["first", "last", "final_norm"],
        keep_originals=True,
        seed=0,
    )
    if checkpointing:
        checkpoint_blocks(pair.pixel.net)
    constants = LossConstants(0.3, 10.0, 0.05, 1e-4, 1e-6, 1e-4, 0.0, True, 0.0, False)
    step, mode = TrainingStep(pair.pixel, None, constants, lambda x: x, None), nullcontext()
    if not real:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        make_fake(step, mode)
    return step, mode


def tiny_batch(name, size=2):
    case, text = case_of(name), tiny_text(name, size)
    tokens = case.grid[0] * case.grid[1]
    wide = torch.zeros(size, tokens, case.sizes.D)
    return Batch(
        wide,
        torch.zeros(size, tokens, case.sizes.d),
        wide + 1,
        torch.full((size,), 0.5),
        torch.ones(size),
        text,
        case.grid,
    )


def footprint(name, device="cpu", **how):
    step, mode = tiny_step(name, **how)
    return measure_step(step, lambda: tiny_batch(name), 2, device, mode)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, False) for name in KINDS), ("flux2", True)],
)
def test_fake_tensors_take_what_real_ones_take(name, checkpointing):
    """To the byte: what is kept, both passes, and the highest before every gradient."""
    real = footprint(name, checkpointing=checkpointing)
    fake = footprint(name, checkpointing=checkpointing, real=False)
    assert fake == real
    assert fake.curve[-1].gradients > 0


def test_among_fake_tensors_masks_and_tables_stay_real():
    """A picture may stand behind as many words as a mask says; a table was there before."""
    table, words = torch.arange(5.0), torch.ones(3, dtype=torch.bool)
    with FakeTensorMode(allow_non_fake_inputs=True), KeepReal(), LiveBytes() as live:
        rows = table[1:]
        mask = torch.cat([words, torch.zeros(2, dtype=torch.bool)])
        count = int(mask.sum())
        assert (count, rows.tolist(), live.live) == (3, [1, 2, 3, 4], 64)
        for index, shape in ((mask, (count, 7)), (mask.expand(2, 5), (2 * count,))):
            kept = torch.zeros(*((5, 7) if index.ndim == 1 else (2, 5)))[index]
            assert isinstance(kept, FakeTensor) and kept.shape == shape


def test_checkpointing_keeps_less():
    plain, less = (footprint("flux2", real=False, checkpointing=c) for c in (False, True))
    assert less.student < 0.5 * plain.student
    assert less.curve[-1].gradients == plain.curve[-1].gradients


def test_on_a_gpu_attention_keeps_no_scores():
    """Nor with a mask; a number per query is kept beside what goes in and comes out."""
    with FakeTensorMode(), LikeCuda("cuda"):
        q = torch.empty(1, 2, 512, 16, requires_grad=True)
        mask = torch.ones(512, 512, dtype=torch.bool)
        with LiveBytes("cuda") as live:
            out = functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            assert out.shape == q.shape
            assert live.live == 4 * (2 * 512 * 16 + 2 * 512)


def test_on_a_gpu_norms_answer_in_float32_under_autocast():
    with FakeTensorMode():
        x = torch.empty(2, 8, dtype=torch.bfloat16)
        weight = torch.empty(8, dtype=torch.bfloat16)
        for device, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
            with LikeCuda(device), torch.autocast("cpu", torch.bfloat16):
                assert functional.layer_norm(x, (8,)).dtype == dtype
                assert functional.rms_norm(x, (8,), weight).dtype == dtype
                assert nn.Linear(8, 8)(x).dtype == torch.bfloat16


def test_a_gpu_is_modelled_through_checkpoints_too():
    """What is computed a second time has to be what was computed at first."""
    on_gpu = footprint("flux2", "cuda", real=False, checkpointing=True)
    assert on_gpu.curve[-1].gradients == footprint("flux2", real=False).curve[-1].gradients

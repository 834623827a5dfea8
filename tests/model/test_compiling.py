"""Compiled blocks compute what they computed before, in both branches and in any order."""

import pytest
import torch
from torch.testing import assert_close

from asymlift.errors import Exit, Unavailable
from asymlift.families import FAMILIES
from asymlift.model.checkpointing import checkpoint_blocks
from asymlift.model.compiling import check_compiler, compile_blocks, explaining_compiler
from asymlift.model.reference import as_reference
from asymlift.model.trainable import Adapters, repeated_blocks, train_parts
from tests.families.case import CHANNELS
from tests.tiny import GRID, tiny_text, tiny_transformer

CPU = torch.device("cpu")


@pytest.fixture
def net():
    """LoRA inside the blocks and twins, one of them a module of a block; all of it has moved."""
    net = tiny_transformer("flux2", num_layers=1, num_single_layers=2)
    trainable = train_parts(
        net,
        FAMILIES["flux2"],
        adapters=Adapters(2, 4.0, 0.0, ("single_transformer_blocks.*.attn.to_out",)),
        modules=["first", "last", "transformer_blocks.0.ff.linear_out"],
        keep_originals=True,
        seed=0,
    )
    for parameter in trainable.parameters.values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    net.trained = list(trainable.parameters.values())
    return net


def both_branches(net) -> tuple[torch.Tensor, ...]:
    """Student, reference, student again; then the gradients."""
    family = FAMILIES["flux2"]
    g = torch.Generator().manual_seed(7)
    latent = torch.randn(2, CHANNELS, 2 * GRID[0], 2 * GRID[1], generator=g)
    time, text = family.time(torch.tensor([0.3, 0.7]), GRID[0] * GRID[1]), tiny_text("flux2", 2)
    net.zero_grad()
    first = family.run(net, latent, time, text)
    with as_reference(net):
        reference = family.run(net, latent, time, text)
    second = family.run(net, latent, time, text)
    (first + second).square().mean().backward()
    grads = [parameter.grad.clone() for parameter in net.trained]
    return first.detach(), reference, second.detach(), *grads


@pytest.mark.parametrize("checkpointing", [False, True])
def test_student_and_reference_keep_apart_and_stay_what_they_were(net, checkpointing):
    """The graph of one branch must not serve the other: that would be silent."""
    if checkpointing:
        checkpoint_blocks(net)
    before, names = both_branches(net), list(net.state_dict())
    assert (before[0] - before[1]).abs().max() > 0.1

    torch._dynamo.reset()
    compile_blocks(net, CPU, backend="aot_eager")
    counted = torch._dynamo.utils.counters
    counted.clear()
    for _ in range(2):
        assert_close(both_branches(net), before)

    assert list(net.state_dict()) == names
    assert counted["stats"]["unique_graphs"] >= 4  # two kinds of block, two branches
    assert not counted["graph_break"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # g++ takes a minute per graph on a busy machine
def test_the_compilers_own_code_agrees_too(net):
    before = both_branches(net)
    torch._dynamo.reset()
    compile_blocks(net, CPU)
    for made, expected in zip(both_branches(net), before, strict=True):
        assert_close(made, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_compiler_that_is_killed_is_no_traceback(monkeypatch, tmp_path):
    """Nor is what comes of other things changed."""
    killed = tmp_path / "g++"
    killed.write_text('#!/bin/sh\ncase "$1" in -*) exec g++ "$@";; esac\nkill -9 $$\n')
    killed.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiled = torch.compile(lambda x: (x.sin() + x.cos()).exp())
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(killed))}),
        pytest.raises(Unavailable, match=r"torch\.compile failed \(.+\).*\n.*compile=false"),
        explaining_compiler(),
    ):
        compiled(torch.randn(4, 64))
    with pytest.raises(ZeroDivisionError), explaining_compiler():
        1 / 0


def test_without_a_compiler_it_says_so_before_anything_runs(net, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(Unavailable, match=r"needs a C\+\+ compiler.*g\+\+.*compile: false") as said:
        compile_blocks(net, CPU)
    assert said.value.exit == Exit.UNAVAILABLE
    assert all(block._compiled_call_impl is None for block in repeated_blocks(net).values())
    with pytest.raises(Unavailable, match=r"needs a C compiler.*gcc"):
        check_compiler(torch.device("cuda"))


def test_on_a_gpu_triton_is_needed_too(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="pip install triton"):
        check_compiler(torch.device("cuda"))

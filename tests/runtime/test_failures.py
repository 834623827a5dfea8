"""What an exception means for a run."""

import pytest
import torch
import torch.distributed as td

from asymlift.errors import Exit
from asymlift.runtime import watch
from asymlift.runtime.failures import is_lost_connection, is_out_of_memory, out_of_memory


def test_no_memory_is_known_whoever_says_it():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


def test_a_rank_that_is_gone_is_known_by_what_a_collective_says():
    assert is_lost_connection(RuntimeError("[x/gloo/transport/tcp/pair.cc] Connection closed"))
    assert is_lost_connection(td.DistBackendError("NCCL communicator was aborted"))
    assert not is_lost_connection(RuntimeError("shapes differ"))
    assert not is_lost_connection(ConnectionResetError("Connection reset by peer"))  # a download


def test_the_message_says_who_where_how_much_and_what_to_do():
    watch.at(12, "saving")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    end = out_of_memory(error, "rank 3 (node7)", advice="Set finetune.zero.stage to 3.")
    assert str(end).splitlines()[0] == (
        "rank 3 (node7) ran out of memory at step 12 while saving: "
        "CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert str(end).endswith("of the machine's memory so far. Set finetune.zero.stage to 3.")
    assert end.exit == Exit.UNAVAILABLE


def test_what_a_gpu_holds_is_said_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 70 << 30)
    said = str(out_of_memory(MemoryError(), "this process"))
    assert "Held here: 70.0 GiB in tensors of 80.0 GiB on the GPU (1.0 GiB free), at most" in said

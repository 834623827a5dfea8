"""One rank or several: what they join, agree on and end with. Launchers: test_launch.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asymlift.errors import BadData, Exit, Unavailable, UserError
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks, device_for, first_does, join, summed
from tests.runtime.test_launch import ALL_NAMES

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in ALL_NAMES})
    monkeypatch.setattr(dist.atexit, "register", lambda call: None)


@pytest.fixture
def no_group(monkeypatch):
    """As in a new process: a finetune in this one may have joined a group."""
    monkeypatch.setattr(torch.distributed.distributed_c10d._world, "default_pg", None)


def test_several_ranks_need_an_address_and_a_port(no_group):
    with pytest.raises(UserError) as caught:
        join(Ranks(1, 2, 1), torch.device("cpu"), timeout=5)
    assert str(caught.value) == (
        "WORLD_SIZE=2, but MASTER_ADDR is not set: the ranks cannot find each other.\n"
        "Start with torchrun, or set it (mpirun: -x MASTER_ADDR=...)"
    )
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    with pytest.raises(UserError, match="MASTER_PORT is not set"):
        join(Ranks(1, 2, 1), torch.device("cpu"), timeout=5)


def test_ranks_that_do_not_come_are_not_waited_for_longer_than_the_timeout(no_group):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(Unavailable) as caught:
            join(Ranks(0, 2, 0), torch.device("cpu"), timeout=2)
    said = str(caught.value)
    assert said.startswith(f"rank 0 of 2 could not join the others at 127.0.0.1:{port} (")
    assert said.endswith("within 2 s; if another program uses the port, set MASTER_PORT")
    with pytest.raises(Unavailable, match=r"(?s)1/2 clients joined.*have to start within 1 s"):
        join(Ranks(0, 2, 0), torch.device("cpu"), timeout=1)


def test_a_rank_computes_on_its_own_gpu_or_on_the_cpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(Ranks(3, 4, 3)) == torch.device("cpu") and chosen == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_for(Ranks(7, 8, 3)) == torch.device("cuda", 3) and chosen == [3]
    with pytest.raises(UserError, match=r"LOCAL_RANK=4, but this machine shows 4 GPU\(s\)"):
        device_for(Ranks(4, 8, 4))


def test_alone_everything_is_already_agreed_on(no_group):
    values = torch.tensor([1.0, 2.0])
    assert summed(values) is values and values.tolist() == [1, 2]
    assert first_does(Ranks(0, 1, 0), lambda: "mine") == "mine"
    dist.barrier()
    dist.leave()


def test_alone_what_one_rank_does_is_what_all_do():
    alone = dist.Ranks(0, 1, 0)

    def fail() -> None:
        raise BadData("broken")

    assert dist.first_does(alone, lambda: 7) == dist.all_do(alone, lambda: 7) == 7
    for together in (dist.first_does, dist.all_do):
        with pytest.raises(BadData, match="broken"):
            together(alone, fail)
    dist.share_error(alone, None)


ALONE_FOR_LONG = """
import sys, time
from pathlib import Path
import torch
from asymlift.runtime import dist
from tests.runtime.forked import Group, run_all

def work(ranks):
    dist.join(ranks, torch.device("cpu"), 2)
    made = dist.first_does(ranks, lambda: time.sleep(3) or "made")
    sys.stderr.write(" ".join(dist.gathered(ranks, f"{made} {ranks.rank}")))

group = Group(Path(sys.argv[1]) / "group", 2, 0, work)
run_all([group], 30)
print([(code, said) for code, _, said in group.told()])
"""


def test_ranks_wait_for_what_one_does_alone_for_longer_than_for_a_collective(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ALONE_FOR_LONG, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[(0, 'made 0 made 1'), (0, 'made 0 made 1')]\n", done.stderr


def test_an_error_of_another_rank_keeps_its_message_and_its_exit_code():
    error = dist.again(dist.described(BadData("a shard is gone")))

    assert (str(error), error.exit) == ("a shard is gone", Exit.BAD_DATA)


ENDING = """
import sys, threading, time
import torch
from asymlift import cli
from asymlift.runtime import dist

def busy():
    while True:
        torch.randn(300, 300) @ torch.randn(300, 300)

for _ in range(4):
    threading.Thread(target=busy, daemon=True).start()
dist.join(dist.Ranks(0, 1, 0), torch.device("cpu"), 10)

def app():
    print("said")
    if "fail" in sys.argv:
        raise ValueError("boom")
    sys.exit(65)

cli.app = app
cli.main()
"""


@pytest.mark.parametrize("word, code, said", [("", 65, ""), ("fail", 1, "ValueError: boom")])
def test_a_process_of_a_group_ends_with_its_own_code_whatever_its_threads_do(word, code, said):
    done = subprocess.run(
        [sys.executable, "-c", ENDING, word], env=os.environ, capture_output=True, text=True
    )
    assert done.stdout == "said\n" and said in done.stderr
    assert done.returncode == code  # Python's own way out ends with -6 here

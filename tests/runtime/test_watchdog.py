"""When a rank dies, fails, stands still or hangs, all end soon, with its name and a code."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from asymlift.errors import BadData, Unavailable
from asymlift.runtime import dist, watch, watchdog
from asymlift.runtime.watchdog import (
    GRACE,
    Line,
    Seen,
    Watchdog,
    accept,
    call,
    hanging,
    listening,
    watched,
)

DRIVER = Path(__file__).with_name("drive_watchdog.py")
ROOT = Path(__file__).parents[2]
LIMIT = 6
AT_ONCE = 2.5  # seconds, on a machine that is busy
WHERE = r"at step 4 while reading data \(sample 4\)"
KILLED = "was killed, perhaps for its memory: it ended without a word"
AGAIN = r"\.\nRun the same command again to go on from the last checkpoint"
LONGER = rf"{AGAIN}; if it only needs longer, raise finetune\.timeout \(now {LIMIT}\)"

# What comes upon a rank: the codes of ranks 0, 1, 2; what the others say; within how many seconds.
TROUBLES = {
    "0 none": ([0, 0, 0], "", AT_ONCE),
    "1 SIGKILL": ([75, -9, 75], rf"rank 1 \(.+\) {KILLED} {WHERE}{AGAIN}", AT_ONCE),
    "0 SIGKILL": ([-9, 75, 75], rf"rank 0 \(.+\) {KILLED} {WHERE}{AGAIN}", AT_ONCE),
    "2 SIGSTOP": (
        [75, 75, 75],
        rf"rank 2 \(.+\) was not heard of for \d+ s, and was last {WHERE}{AGAIN}",
        LIMIT + 10,
    ),
    "0 SIGSTOP": (
        [75, 75, 75],
        rf"rank 0 \(.+\) was not heard of for \d+ s, and was last {WHERE}{AGAIN}",
        LIMIT + 10,
    ),
    "1 hang": (
        [75, 75, 75],
        rf"rank 1 \(.+\) has not moved for \d+ s \(at data/reader.py:88\), {WHERE}{LONGER}",
        LIMIT + 10,
    ),
    "0 hang": (
        [75, 75, 75],
        rf"rank 0 \(.+\) has not moved for \d+ s \(at data/reader.py:88\), {WHERE}{LONGER}",
        LIMIT + 10,
    ),
    "1 memory": (
        [69, 69, 69],
        rf"rank 1 \(.+\) ran out of memory {WHERE}: can't allocate memory: you tried to allocate "
        r"\d+ bytes.*\nHeld here: at most .* so far\. Try a smaller finetune\.micro_batch .*",
        AT_ONCE,
    ),
    "0 data": ([65, 65, 65], rf"rank 0 \(.+\) failed {WHERE}: a shard is gone", AT_ONCE),
    "2 mistake": ([1, 1, 1], rf"rank 2 \(.+\) failed {WHERE}: ValueError: boom", AT_ONCE),
    "0 agreed": ([65, 65, 65], "", GRACE + 1 + AT_ONCE),
    "1 SIGINT": ([130, 1, 130], rf"rank 1 \(.+\) stopped {WHERE}: Ctrl-C", AT_ONCE),
}


@pytest.fixture(scope="module")
def ends() -> dict[str, list[tuple[int, float, str]]]:
    """All groups at once: most of them wait."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(LIMIT), json.dumps(list(TROUBLES))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        timeout=240,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_all_ranks_end_soon_with_a_code_and_the_name_of_the_one(ends, trouble):
    codes, said, soon = TROUBLES[trouble]
    worst = int(trouble.split()[0])

    assert [code for code, _, _ in ends[trouble]] == codes
    for rank, (_, seconds, text) in enumerate(ends[trouble]):
        assert seconds < soon, (rank, seconds)
        if rank != worst and said:
            assert re.fullmatch(f"error: {said}\n", text), text


def test_the_rank_itself_says_what_it_would_say_alone(ends):
    assert ends["0 data"][0][2] == "error: a shard is gone\n"
    assert ends["2 mistake"][2][2].endswith("ValueError: boom\n")
    assert ends["1 SIGINT"][1][2].endswith("KeyboardInterrupt\n")
    assert all(text == "" for _, _, text in ends["0 none"])


def test_a_rank_that_ends_as_agreed_may_close_what_it_wrote_to(ends):
    """A tracker may take longer to send the rest than the others wait for a rank that failed."""
    assert [text for _, _, text in ends["0 agreed"]] == ["error: all agree\n"] * 3
    assert ends["0 agreed"][0][1] > GRACE + 1


def test_one_that_was_stopped_does_not_go_on_alone(ends):
    for trouble, rank in (("2 SIGSTOP", 2), ("0 SIGSTOP", 0)):
        assert "was not heard of" in ends[trouble][rank][2]


# ---- judging -----------------------------------------------------------------------------------


def seen(age: float, patience: float = 1.0, heard: float = 0.0) -> Seen:
    return Seen("here", "while sleeping", "", age, patience, heard)


def test_of_those_that_stand_still_the_first_to_do_so_hangs():
    """The others went on until they had to wait for it."""
    assert hanging({0: seen(1), 1: seen(9)}, now=0, limit=10) is None
    assert hanging({0: seen(1), 1: seen(9)}, now=2, limit=10) == 1
    assert hanging({0: seen(11), 1: seen(12), 2: seen(3)}, now=0, limit=10) == 1


def test_what_comes_first_may_take_longer_unless_somebody_already_gave_up():
    ranks = {0: seen(35, patience=4), 1: seen(1)}
    assert hanging(ranks, now=0, limit=10) is None
    assert hanging(ranks, now=6, limit=10) == 0
    assert hanging(ranks, now=0, limit=10, patient=False) == 0


def test_a_process_that_stood_still_itself_blames_nobody_for_that_time():
    dog = Watchdog(dist.Ranks(0, 2, 0), 10, {1: Line(socket.socket())})
    watch.at(3, "dreaming")
    now = time.monotonic() + 3600

    assert dog.judged(now, 10) is not None
    dog.forgive(3600, now)
    assert dog.judged(now, 10) is None
    dog.lines[1].close()


def test_a_collective_that_fails_with_nobody_to_blame_can_be_tried_again(monkeypatch):
    """As when a cable is pulled and both ends live."""
    monkeypatch.setattr(watchdog, "ANSWER", 0.05)
    watch.at(7, "saving")
    mine, other = socket.socketpair()
    dog = Watchdog(dist.Ranks(1, 2, 1), 10, {0: Line(mine)})

    reason = dog.reason(RuntimeError("[gloo/transport/tcp] Connection reset by peer"))

    assert str(reason) == (
        "the ranks lost each other at step 7 while saving "
        "([gloo/transport/tcp] Connection reset by peer).\n"
        "Run the same command again to go on from the last checkpoint"
    )
    assert reason.exit == 75
    question, told = Line(other).read()
    assert question == {"asks": True} and told["exit"] == 75
    mine.close(), other.close()


def test_alone_there_is_nobody_to_watch_but_memory_runs_out_in_words():
    alone, before = dist.Ranks(0, 1, 0), threading.active_count()
    with watched(alone, 10):
        assert threading.active_count() == before
    with pytest.raises(BadData, match="broken"), watched(alone, 10):
        raise BadData("broken")
    said = "this process ran out of memory while starting: MemoryError"
    with pytest.raises(Unavailable, match=said), watched(alone, 10):
        raise MemoryError


# ---- meeting -----------------------------------------------------------------------------------


def test_strangers_are_sent_away_and_ranks_let_in():
    with listening(3) as server:
        port = server.getsockname()[1]
        nosy = socket.create_connection(("127.0.0.1", port))
        nosy.sendall(b"5\nGET /\n")
        lines = [call("127.0.0.1", port, rank, "secret") for rank in (2, 1)]
        met = accept(server, 3, "secret")
    assert sorted(met) == [1, 2]
    met[2].send({"to": 2})
    assert lines[0].read() == [{"to": 2}]
    assert nosy.recv(1) == b""
    for line in (*lines, *met.values(), nosy):
        line.close()


def test_words_that_are_cut_off_are_left_out_and_an_end_is_noticed():
    mine, other = socket.socketpair()
    line = Line(mine)
    other.sendall(b'{"a": 1}\n{"b": \n{"c"')
    assert line.read() == [{"a": 1}]
    other.sendall(b": 3}\n")
    assert line.read() == [{"c": 3}]
    other.close()
    assert line.read() is None
    line.send({"nobody": "hears"})
    line.close()


def test_machines_that_cannot_reach_each_other_are_told_so(monkeypatch):
    monkeypatch.setattr(watchdog, "MEETING", 0.2)
    with listening(3) as server:
        port = server.getsockname()[1]
        late = call("127.0.0.1", port, 2, "secret")
        with pytest.raises(Unavailable) as caught:
            accept(server, 3, "secret")
        late.close()
    assert str(caught.value) == (
        "rank 1 did not reach rank 0 within 0 s; "
        "the machines of a run have to reach each other on every port"
    )
    with pytest.raises(
        Unavailable, match=rf"rank 2 \(.+\) cannot reach rank 0 at 127.0.0.1:{port} "
    ):
        call("127.0.0.1", port, 2, "secret")

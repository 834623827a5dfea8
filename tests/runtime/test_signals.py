"""A request to stop lets the step end; a second Ctrl-C does not."""

import os
import signal

import pytest

from asymlift.errors import Exit, StoppedEarly
from asymlift.runtime.signals import SAVE_QUIT, StopRequest, raising_on_signals, stop_requests

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")])
def test_a_schedulers_signal_asks_and_the_command_can_go_on_later(number, name):
    with stop_requests() as request:
        assert request.reason is None
        send(number)
        assert (request.reason, request.exit) == (name, Exit.RESUMABLE)
        send(number)  # again: it is asked for already
        assert request.reason == name


def test_the_first_ctrl_c_asks_and_the_second_interrupts():
    with stop_requests() as request:
        send(signal.SIGINT)
        assert (request.reason, request.exit) == ("Ctrl-C", Exit.INTERRUPTED)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_ctrl_c_after_another_request_interrupts():
    """Somebody does not want to wait for the save that a signal asked for."""
    with stop_requests() as request:
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert request.exit == Exit.RESUMABLE


def test_afterwards_signals_do_what_they_did_before():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.raises(RuntimeError), stop_requests():
        assert all(signal.getsignal(number) != before[number] for number in SIGNALS)
        raise RuntimeError
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_file_in_the_run_folder_asks_too(tmp_path):
    request = StopRequest()
    request.look_for_file(tmp_path)
    assert request.reason is None
    (tmp_path / SAVE_QUIT).touch()
    request.look_for_file(tmp_path)
    assert (request.reason, request.exit) == ("a save_quit file", Exit.RESUMABLE)


def test_a_file_does_not_change_the_reason_that_was_there(tmp_path):
    (tmp_path / SAVE_QUIT).touch()
    request = StopRequest(reason="SIGTERM")
    request.look_for_file(tmp_path)
    assert request.reason == "SIGTERM"


def test_the_file_is_taken_away_once_it_was_obeyed(tmp_path):
    request = StopRequest()
    (tmp_path / SAVE_QUIT).touch()
    request.obeyed(tmp_path)
    request.obeyed(tmp_path)
    request.look_for_file(tmp_path)
    assert request.reason is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_work_that_loses_nothing_stops_at_once_with_a_message(number):
    before = signal.getsignal(number)
    with (
        pytest.raises(StoppedEarly, match=signal.Signals(number).name) as stop,
        raising_on_signals(),
    ):
        send(number)
    assert stop.value.exit == Exit.RESUMABLE
    assert signal.getsignal(number) == before

"""finetune is asked to stop, and loses nothing."""

from tests.reliability.started import told_by


def test_asked_on_one_rank_all_ranks_save_the_same_step_and_the_next_start_goes_on():
    found = told_by("stop_finetune", "ask", "2", "2", "1", "12")
    assert found["problems"] == []
    assert found["ends equal to the whole run"]
    assert found["steps taken again"] == 0
    assert [stop["way"] for stop in found["each"]] == ["SIGTERM", "SIGUSR1"]
    assert [stop["exit codes"] for stop in found["each"]] == [[75, 75]] * 2

"""finetune is asked to stop, and loses nothing."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_asked_on_one_rank_all_ranks_save_the_same_step_and_the_next_start_goes_on():
    process = subprocess.run(
        [sys.executable, "-m", "tests.reliability.stop_finetune", "ask", "2", "2", "1", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout)
    assert found["problems"] == []
    assert found["ends equal to the whole run"]
    assert found["steps taken again"] == 0
    assert [stop["way"] for stop in found["each"]] == ["SIGTERM", "SIGUSR1"]
    assert [stop["exit codes"] for stop in found["each"]] == [[75, 75]] * 2

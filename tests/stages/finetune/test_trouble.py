"""A finetune whose ranks do not all get through: it ends by itself, says why, and can go on."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from asymlift.embedded import MODELS
from asymlift.errors import Exit
from tests.stages.finetune.drive_trouble import STOPPED_FOR
from tests.stages.small_run import ROOT, another_run, build

DRIVER = Path(__file__).with_name("drive_trouble.py")


@dataclass
class Pair:
    """How the two ranks of one finetune ended."""

    folder: Path
    codes: list[int]
    seconds: list[float]  # that each lived on after the trouble
    said: list[str]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    """All at once, and begun as copies of one process."""
    recipe = build(tmp_path_factory.mktemp("trouble"))
    runs = recipe.parent
    prompts = runs / "prompts.txt"
    prompts.write_text("a red disc on blue\na green square on white\n")
    shown = f"finetune.preview={{every: 2, prompts: {prompts}}}"
    (runs / "base-0").symlink_to(MODELS["tiny"])
    for rank in range(2):
        (runs / f"elsewhere-{rank}").mkdir()
    jobs = {
        "stop": ("stop", 1, []),
        "memory": ("memory", 0, []),
        "preview": ("preview", 1, ["finetune.zero.stage=3", shown]),
        "base": ("nothing", 1, [f"model.base={runs}/base-{{rank}}", shown]),
        "elsewhere": ("nothing", 1, [f"runs={runs}/elsewhere-{{rank}}"]),
    }
    given = {
        name: (what, rank, [another_run(recipe, name), "finetune.timeout=240", *words])
        for name, (what, rank, words) in jobs.items()
    }
    done = subprocess.run(
        [sys.executable, DRIVER, recipe, runs / "ends", json.dumps(given)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    return {name: Pair(runs / name, *map(list, zip(*told[name], strict=True))) for name in jobs}


def test_a_rank_that_stands_still_ends_all_and_then_itself(pairs):
    pair = pairs["stop"]
    assert pair.codes == [Exit.RESUMABLE] * 2, pair.said
    assert pair.seconds[0] < STOPPED_FOR + 10
    for text in pair.said:
        assert re.search(
            r"error: rank 1 \(.+\) was not heard of for \d+ s, and was last at step 5 while "
            r"computing gradients \(from \d+ on\)\.\nRun the same command again to go on",
            text,
        ), text
        assert "Traceback" not in text


def test_memory_that_runs_out_on_one_rank_is_everybodys_message(pairs):
    pair = pairs["memory"]
    assert pair.codes == [Exit.UNAVAILABLE] * 2, pair.said
    for text in pair.said:
        assert re.search(r"error: rank 0 \(.+\) ran out of memory at step 5 while", text), text
        assert "Traceback" not in text


def test_what_is_left_behind_can_go_on(pairs):
    for name in ("stop", "memory"):
        assert [path.name for path in (pairs[name].folder / "checkpoints").iterdir()] == [
            "step-000003"
        ]


def test_a_preview_of_nan_on_one_rank_ends_all(pairs):
    """Under ZeRO-3, where the other rank is inside a forward that needs both."""
    pair = pairs["preview"]
    assert pair.codes == [Exit.BAD_DATA] * 2, pair.said
    said = "the network answers with NaN or infinity at noise level"
    assert re.search(
        r"error: rank 1 \(.+\) failed at step 2 while drawing previews \(prompt 2 of 2\): "
        rf".*{said}",
        pair.said[0],
    ), pair.said[0]
    assert said in pair.said[1] and "rank 1" not in pair.said[1]
    assert pair.seconds[0] < 15
    assert (pair.folder / "samples" / "step-000000" / "grid.png").exists()


def test_a_base_that_one_machine_lacks_is_drawn_by_none(pairs):
    """Or some ranks would wait for pictures that the others never draw."""
    pair = pairs["base"]
    assert pair.codes == [Exit.DONE] * 2, pair.said
    assert "warning: previews without the row of the base: model.base: " in pair.said[0]
    samples = pair.folder / "samples"
    assert (samples / "step-000000" / "grid.png").exists() and not (samples / "base").exists()


def test_a_run_folder_that_is_not_shared_is_refused_and_left_as_it_was(pairs):
    pair = pairs["elsewhere"]
    runs = pair.folder.parent
    assert pair.codes == [Exit.CANNOT_WRITE] * 2, pair.said
    for text in pair.said:
        assert re.search(
            r"error: .*/elsewhere-1/elsewhere: on rank 1 \(.+\) this is not the folder that "
            r"rank 0 \(.+\) writes to\.\nPut `runs` on a file system that all machines share",
            text,
        ), text
    assert list((runs / "elsewhere-0").rglob("*")) == [runs / "elsewhere-0" / "elsewhere"]
    assert list((runs / "elsewhere-1").rglob("*")) == []

"""The Slurm template: its commands are ours, and what it puts back into the queue can go on."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from asymlift.cli import app
from asymlift.errors import Exit
from tests.stages.small_run import recipe_values

TEMPLATE = Path(__file__).parents[1] / "recipes" / "finetune.sbatch"

# Stand-ins for Slurm's programs: what srun ends with is given, the other writes what it is told.
SRUN = """#!/bin/bash
trap 'touch "$FOLDER/told"; exit "$CODE"' USR1
echo "$@" > "$FOLDER/started.part" && mv "$FOLDER/started.part" "$FOLDER/started"
[ -n "$UNTIL_ASKED" ] && for _ in {1..200}; do sleep 0.05; done
exit "$CODE"
"""
SCONTROL = '#!/bin/bash\necho "$@" >> "$FOLDER/queue"\n'


def submitted(
    folder: Path, code: int, *, ask: bool = False, restarts: int = 0
) -> tuple[int, bool, str]:
    """Run the template: its own code, whether it was put back into the queue, what it said."""
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(TEMPLATE), "my model.yaml"],
        env={
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "FOLDER": str(folder),
            "CODE": str(code),
            "UNTIL_ASKED": "yes" if ask else "",
            "SLURM_JOB_ID": "4711",
            "SLURM_RESTART_COUNT": str(restarts),
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    if ask:
        while not (folder / "started").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=30)[1]
    assert (folder / "started").read_text().endswith("asymlift finetune my model.yaml\n")
    assert (folder / "told").exists() == ask
    calls = folder / "queue"
    assert not calls.exists() or calls.read_text() == "requeue 4711\n"
    return process.returncode, calls.exists(), said


@pytest.mark.parametrize(
    "code, ask, again",
    [
        (0, False, False),
        (75, False, True),  # a rank was lost
        (75, True, True),
        (0, True, False),  # it was done before the stop
        (137, False, True),
        (1, False, False),
        (1, True, True),  # what torchrun makes of 75
        (78, False, False),
        (69, False, False),
    ],
)
def test_what_can_go_on_is_put_back_into_the_queue_and_nothing_else(tmp_path, code, ask, again):
    assert submitted(tmp_path / "job", code, ask=ask)[:2] == (code, again)


def test_it_is_not_put_back_for_ever(tmp_path):
    code, again, said = submitted(tmp_path / "job", 75, restarts=50)
    assert (code, again) == (75, False)
    assert "restarted 50 times" in said


def test_its_commands_parse(tmp_path):
    """Those in comments too, once the # is taken away."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(tmp_path)))
    text = TEMPLATE.read_text().replace("\n# host=", "\nhost=").replace("\n# run=", "\nrun=")
    text = text.replace("\n#     -", "\n    -")
    commands = [shlex.split(body) for body in re.findall(r"^run=\((.*?)\)$", text, re.S | re.M)]
    assert [command[:2] for command in commands] == [
        ["srun", "--kill-on-bad-exit=0"],
        ["srun", "torchrun"],
    ]
    for command in commands:
        ours = command[command.index("asymlift") + 1 :]
        ours[ours.index("$RECIPE")] = str(recipe)
        result = CliRunner().invoke(app, [*ours, "--dry-run"])
        # The recipe is read and checked; what is missing is only the lifted model.
        assert result.exit_code in (Exit.DONE, Exit.UNAVAILABLE, Exit.BAD_DATA), result.output
        assert "No such" not in result.output
    uncommented = tmp_path / "all.sbatch"
    uncommented.write_text(text)
    subprocess.run(["bash", "-n", uncommented], check=True)

"""The command line: help, exit codes, dry runs, JSON, and messages without tracebacks."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from asymlift import __version__
from asymlift.cli import app
from asymlift.data.pictures import encode_png
from asymlift.errors import Exit
from asymlift.families import FAMILIES
from tests.stages.small_run import build, recipe_values

COMMANDS = ["fit-basis", "convert", "finetune", "sample", "demo"]
COMMANDS += ["families", "inspect", "verify", "doctor"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def fresh_recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values(tmp_path)))
    return path


def test_help_lists_every_command_and_loads_no_torch():
    script = "import sys\nimport asymlift.cli\nprint('torch' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    help_text = run("--help").output

    assert loaded.stdout.strip() == "False"
    assert all(command in help_text for command in COMMANDS)
    assert run("--version").output.strip() == f"asymlift {__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    assert run(command, "--help").exit_code == Exit.DONE


def test_what_deepspeed_puts_before_every_command_is_accepted_and_not_shown():
    assert run("--local_rank=1", "finetune", "--help").exit_code == Exit.DONE
    assert "local" not in run("--help").output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["fit-basis", "missing.yaml"], Exit.BAD_RECIPE, "missing.yaml: no such recipe"),
        (["finetun"], Exit.USAGE, "No such command"),
        (["convert"], Exit.USAGE, "Missing argument"),
        (["inspect", "nowhere"], Exit.BAD_DATA, "nowhere: there is no such file or folder"),
        (["sample", "x.yaml", "--num", "0"], Exit.USAGE, "--num"),
        (["plan", "x.yaml", "--gpu-memory", "inf"], Exit.USAGE, "--gpu-memory"),
        (["verify", "nowhere"], Exit.BAD_DATA, "nowhere: there is no such file or folder"),
    ],
)
def test_wrong_use_ends_in_a_message_and_a_code(arguments, code, said):
    result = run(*arguments)

    assert result.exit_code == code
    assert said in result.output
    assert "Traceback" not in result.output


def test_steps_out_of_order_are_refused_with_the_step_that_is_missing(fresh_recipe):
    for command, missing in (
        ("convert", "asymlift fit-basis"),
        ("finetune", "asymlift convert"),
        ("sample", "asymlift convert"),
    ):
        extra = ["--prompt", "a red disc", "--weights", "lifted"] if command == "sample" else []
        result = run(command, fresh_recipe, *extra)
        assert result.exit_code == Exit.UNAVAILABLE, result.output
        assert f"run `{missing}` on this recipe first" in result.output


def test_a_base_that_is_not_there_is_not_downloaded(fresh_recipe):
    result = run("fit-basis", fresh_recipe, "--set", "model.base=org/model")

    assert result.exit_code == Exit.UNAVAILABLE
    assert "Nothing is downloaded unasked" in result.output
    assert "hf download OWNER/NAME --local-dir org/model" in result.output


def test_an_embedded_model_that_does_not_exist_names_those_that_do(fresh_recipe):
    result = run("fit-basis", fresh_recipe, "--set", "model.base=embedded:huge")

    assert result.exit_code == Exit.BAD_RECIPE
    assert "there are tiny, tiny-good-vae" in result.output


def test_missing_shards_are_named(fresh_recipe):
    result = run("fit-basis", fresh_recipe)

    assert result.exit_code == Exit.BAD_DATA
    assert "000000.tar: there is no such shard" in result.output


@pytest.mark.parametrize("command", ["fit-basis", "convert", "finetune"])
def test_a_dry_run_prints_the_whole_recipe_and_writes_nothing(recipe, command):
    before = sorted(recipe.parent.rglob("*"))

    result = run(command, recipe, "--dry-run", "--json", "--set", "finetune.steps=3")

    document = json.loads(result.stdout)
    assert document["recipe"]["finetune"]["steps"] == 3
    assert document["recipe"]["finetune"]["optimizer"]["eps"] == 1e-8  # a default, resolved
    assert document["checks"]
    assert sorted(recipe.parent.rglob("*")) == before
    assert "finetune:" in run(command, recipe, "--dry-run").output


def test_a_dry_run_of_finetune_looks_for_what_is_held_out(recipe):
    held = recipe.parent / "held.tar"
    wanted = ["--set", "finetune.validation={every: 2}", "--set", f"data.validation={held}"]
    missing = run("finetune", recipe, "--dry-run", *wanted)
    assert missing.exit_code == Exit.BAD_DATA
    assert "held.tar: there is no such shard" in missing.output
    wanted[-1] = f"data.validation={recipe.parent}/shards/000000.tar"
    found = run("finetune", recipe, "--dry-run", "--json", *wanted)
    assert json.loads(found.stdout)["checks"]["held out"] == "1 source"


def test_a_dry_run_of_sample_checks_the_size(recipe):
    wanted = ["--prompt", "a red disc", "--weights", "lifted", "--dry-run"]

    assert run("sample", recipe, *wanted, "--json").exit_code == Exit.DONE
    result = run("sample", recipe, *wanted, "--set", "sample.height=30")
    assert result.exit_code == Exit.BAD_RECIPE
    assert "the nearest is 32" in result.output


def test_errors_are_json_too(fresh_recipe):
    result = run("convert", fresh_recipe, "--json")

    document = json.loads(result.stdout)
    assert document["exit"] == Exit.UNAVAILABLE
    assert "run `asymlift fit-basis`" in document["error"]

    wrong = run("plan", fresh_recipe, "--gpus", "x", "--json")
    assert wrong.exit_code == Exit.USAGE
    document = json.loads(wrong.stdout)
    assert document["exit"] == Exit.USAGE
    assert "'--gpus'" in document["error"]


def test_of_several_ranks_that_fail_the_first_alone_prints_json(fresh_recipe, monkeypatch):
    said = []
    for rank in "01":
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        result = run("finetune", fresh_recipe, "--set", "finetune.steps=0", "--json")
        assert result.exit_code == Exit.BAD_RECIPE
        assert "finetune.steps" in result.stderr
        said.append(result.stdout)
    assert json.loads(said[0])["exit"] == Exit.BAD_RECIPE
    assert said[1] == ""


def test_running_a_finished_stage_again_says_so(recipe):
    for command in ("fit-basis", "convert"):
        result = run(command, recipe)
        assert result.exit_code == Exit.DONE, result.output
        assert "already there" in result.output
        assert "next: asymlift" in result.output


def test_samples_are_drawn_described_and_verified(recipe, tmp_path):
    out = tmp_path / "pictures"
    arguments = ["sample", recipe, "--prompt", "a red striped disc on blue with letter A"]
    arguments += ["--weights", "lifted", "--weights", "base", "--out", out]

    result = run(*arguments, "--json")

    document = json.loads(result.stdout)
    assert document["num_drawn"] == 2
    assert (out / "grid.png").is_file()
    assert "all there already" in run(*arguments).output


def test_sample_needs_prompts_and_known_weights(recipe):
    assert "no prompts: give --prompt" in run("sample", recipe).output
    result = run("sample", recipe, "--prompt", "x", "--weights", "best")
    assert result.exit_code == Exit.BAD_RECIPE
    assert "choose from base, lifted, ema, raw" in result.output
    result = run("sample", recipe, "--prompt", "x", "--prompts", "none.txt")
    assert "none.txt is no file" in result.output
    result = run("sample", recipe, "--prompt", "x")
    assert result.exit_code == Exit.UNAVAILABLE
    assert "no checkpoint; run `asymlift finetune` first" in result.output
    result = run("sample", recipe, "--prompt", "x", "--step", "7")
    assert "step-000007: not there yet" in result.output


def test_finetune_is_told_where_to_begin_and_whether_to_rehearse(recipe):
    """A path that is not there is no fresh start, and what is there is not overwritten."""
    one_step = ["--set", "finetune.steps=1", "--set", "name=told"]
    (recipe.parent / "told").mkdir()
    (recipe.parent / "told" / "lifted").symlink_to(recipe.parent / "run" / "lifted")
    for more in ([], ["--dry-run"]):
        result = run("finetune", recipe, *one_step, "--resume", "gone/step-000005", *more)
        assert result.exit_code == Exit.BAD_DATA
        assert "--resume gone/step-000005: there is no such checkpoint" in result.output
    assert "rehearsed" not in run("finetune", recipe, *one_step, "--no-rehearse").output

    again = run("finetune", recipe, *one_step, "--resume", "none")
    assert again.exit_code == Exit.CANNOT_WRITE
    assert "holds step 1, and --resume none would begin anew" in again.output

    changed = ["--set", "finetune.steps=2", "--set", "name=told", "--set", "finetune.loss.weight=2"]
    assert "add --allow-changes" in run("finetune", recipe, *changed).output
    done = run("finetune", recipe, *changed, "--allow-changes", "--rehearse")
    assert done.exit_code == Exit.DONE
    assert "rehearsed, and thrown away" in done.output
    assert "allowed by --allow-changes" in done.output


def test_inspect_and_verify_know_what_was_made(recipe):
    folder = recipe.parent / "run"
    for path, kind in (
        (recipe, "recipe"),
        (folder / "basis.safetensors", "basis"),
        (folder / "lifted", "lifted"),
        (recipe.parent / "shards/000000.tar", "shard"),
    ):
        assert json.loads(run("inspect", path, "--json").stdout)["kind"].startswith(kind)
        assert run("inspect", path).exit_code == Exit.DONE
    assert run("verify", folder / "lifted").exit_code == Exit.DONE
    assert "whole" in run("verify", folder / "basis.safetensors").output


def test_verify_fails_on_one_flipped_bit(recipe, tmp_path):
    damaged = tmp_path / "basis.safetensors"
    data = bytearray((recipe.parent / "run" / "basis.safetensors").read_bytes())
    data[-5] ^= 4
    damaged.write_bytes(bytes(data))

    result = run("verify", damaged)

    assert result.exit_code == Exit.BAD_DATA
    assert "problem:" in result.output


def test_families_are_listed_with_what_is_proven_of_each():
    shown = run("families").output
    found = json.loads(run("families", "--json").output)["families"]

    assert [family["name"] for family in found] == list(FAMILIES)
    for family in found:
        assert family["class"] in shown and all(name in shown for name in family["checkpoints"])
        assert f"{family['d']}/{family['D']}" in shown
        assert all(why in shown for why in family["unproven"].values())
        assert all(f"pip install '{source}'" in shown for source in family["needs"].values())
    takers = [family["name"] for family in found if family["references"]]
    assert takers == ["flux2"]
    assert f"{takers[0]}: can go by pictures too" in shown
    assert "sampling: the stock pipeline around the lifted model ends on" in shown


def test_doctor_answers_in_both_forms():
    result = run("doctor", "--json")

    assert result.exit_code in (Exit.DONE, Exit.UNAVAILABLE)
    assert "torch" in result.stdout


def test_what_is_not_our_fault_keeps_its_traceback():
    """A mistake of our own must be seen; only what a user can fix is a short message."""
    script = (
        "import asymlift.cli as cli\n"
        "def broken(*a, **k): raise RuntimeError('ours')\n"
        "cli.load_recipe = broken\n"
        "cli.main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "fit-basis", "x.yaml"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.returncode == Exit.UNEXPECTED
    assert "RuntimeError" in result.stderr


def test_ctrl_c_and_our_own_mistakes_are_json_too(monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("asymlift.cli.load_recipe", interrupted)
    result = run("convert", "x.yaml", "--json")
    assert result.exit_code == Exit.INTERRUPTED
    assert "run the same command again" in json.loads(result.stdout)["error"]

    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("asymlift.cli.load_recipe", broken)
    result = run("convert", "x.yaml", "--json")
    assert result.exit_code == Exit.UNEXPECTED
    assert json.loads(result.stdout) == {"error": "RuntimeError: ours", "exit": 1}


def test_other_prompts_go_to_another_folder(recipe):
    wanted = ["--weights", "lifted", "--dry-run", "--json"]
    folders = {
        json.loads(run("sample", recipe, "--prompt", text, *wanted).stdout)["checks"]["would write"]
        for text in ("a red disc", "a red disc!", "a teal cross")
    }
    assert len(folders) == 3
    assert any("prompts-a-teal-cross-" in folder for folder in folders)


@pytest.fixture
def references(tmp_path) -> list[Path]:
    paths = [tmp_path / "room.png", tmp_path / "chair.png"]
    for grey, path in enumerate(paths, start=1):
        picture = torch.full((3, 64, 64 + 32 * grey), 60 * grey, dtype=torch.uint8)
        path.write_bytes(encode_png(picture))
    return paths


def test_pictures_to_go_by_are_taken_and_others_go_to_another_folder(recipe, references):
    wanted = ["sample", recipe, "--prompt", "a red disc", "--weights", "lifted"]
    wanted += ["--set", "sample.steps=2"]
    room, chair = (["--reference", path] for path in references)

    def would_write(*given):
        checks = json.loads(run(*wanted, *given, "--dry-run", "--json").stdout)["checks"]
        assert checks.get("references", 0) == len(given) // 2
        return checks["would write"]

    given = [(), room, (*room, *chair), (*chair, *room)]
    assert len({would_write(*one) for one in given}) == len(given)
    before = would_write(*room)
    references[0].write_bytes(references[1].read_bytes())
    assert would_write(*room) == would_write(*chair) != before  # the bytes count, not the name

    drawn = json.loads(run(*wanted, *room, "--json").stdout)
    assert drawn["num_drawn"] == 1 and drawn["folder"] == would_write(*room)
    assert "all there already" in run(*wanted, *chair).output
    shown = run("inspect", drawn["folder"]).output
    assert hashlib.sha256(references[1].read_bytes()).hexdigest()[:12] in shown


def test_a_reference_that_is_not_there_or_no_picture_is_named(recipe, references, tmp_path):
    wanted = ["sample", recipe, "--prompt", "a red disc", "--weights", "lifted", "--dry-run"]
    none, words = tmp_path / "none.png", tmp_path / "words.png"
    words.write_text("a room")

    missing = run(*wanted, "--reference", none)
    foreign = run(*wanted, "--reference", words, "--json")

    assert missing.exit_code == Exit.UNAVAILABLE
    assert f"error: reference picture {none}: there is no such file" in missing.output
    assert foreign.exit_code == Exit.BAD_DATA
    assert "words.png: not a JPEG, PNG or WebP" in json.loads(foreign.stdout)["error"]


def test_help_says_that_references_are_not_trained_on():
    shown = " ".join(run("sample", "--help").output.split())
    assert "finetune trains on none" in shown


def test_a_run_folder_that_cannot_be_made_is_named(recipe):
    result = run("fit-basis", recipe, "--set", "runs=/proc/nowhere")

    assert result.exit_code == Exit.CANNOT_WRITE
    assert "/proc/nowhere/run: cannot be made" in result.output


def test_a_basis_with_few_judges_says_so(recipe, tmp_path):
    few = ["--set", f"runs={tmp_path}", "--set", "basis.holdout=4"]

    assert "only 4 image(s) judge it: too few to trust" in run("fit-basis", recipe, *few).output
    assert "too few to trust" not in run("fit-basis", recipe).output

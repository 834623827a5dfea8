"""`doctor` names what is wrong with a machine and what to do, and never falls over it."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from asymlift.errors import BadData
from asymlift.families import FAMILIES
from asymlift.recipe import check_recipe
from asymlift.runtime import torchvision_shim
from asymlift.stages.doctor import machine as doctor_machine
from asymlift.stages.doctor import packages as doctor_packages
from asymlift.stages.doctor import recipe as doctor_recipe
from asymlift.stages.doctor.check import Check
from asymlift.stages.doctor.packages import EXTRAS, package
from asymlift.stages.doctor.table import as_json, examine, guarded, is_fit, render

GIB = 2**30


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


def only(look):
    (check,) = look()
    return check


def test_everything_is_looked_at_and_the_packages_of_this_machine_are_fit():
    checks = examine()
    names = [check.name for check in checks]
    assert names[: len(doctor_packages.TESTED)] == list(doctor_packages.TESTED)
    assert {"deepspeed accelerator", "memory", "disk", "launcher"} <= set(names)
    assert [c for c in checks if c.name in doctor_packages.TESTED and c.status == "fail"] == []


def test_the_table_of_tested_versions_has_all_that_pyproject_requires():
    assert set(doctor_packages.lowest_versions()) == set(doctor_packages.TESTED) - {"python"}


def test_people_and_programs_read_the_same():
    checks = [
        Check("disk", "warn", "1.0 GiB free", "better 20.0 GiB", "buy one"),
        Check("x", "fail", "gone"),
    ]
    document = json.loads(json.dumps(as_json(checks)))
    assert document["fit"] is False
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(render(checks))
    page = console.export_text()
    for check in document["checks"]:
        for text in check.values():
            assert text in page
    assert is_fit(checks[:1])


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    check = only(lambda: package("peft"))
    assert (check.status, check.found) == ("fail", "not installed")
    assert check.remedy.startswith("pip install 'peft>=0.")


@pytest.mark.parametrize(
    "error",
    [OSError("libcudart.so.13: cannot open"), SystemExit(3), AttributeError("a\nb"), KeyError("k")],
)
def test_a_package_that_breaks_on_import_is_one_line(monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr(doctor_packages, "import_quietly", broken)
    check = only(lambda: package("lpips"))
    assert check.status == "fail"
    assert f"does not import: {type(error).__name__}" in check.found
    assert "\n" not in check.found
    assert "force-reinstall 'lpips==0.1.4'" in check.remedy


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.13.0+cu130", "ok"),
        ("2.13.2", "ok"),
        ("2.9.1", "warn"),
        ("3.0.0", "warn"),
        ("2.7", "fail"),
    ],
)
def test_versions_too_old_fail_and_others_than_tested_warn(monkeypatch, version, status):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    check = only(lambda: package("torch"))
    assert check.status == status
    assert version in check.found
    if status == "fail":
        assert "pip install -U 'torch>=2.8'" in check.remedy


def test_a_torchvision_for_another_torch_is_named(monkeypatch):
    monkeypatch.setattr(torchvision_shim, "declare_missing_schemas", lambda: True)
    check = only(lambda: package("torchvision"))
    assert check.status == "ok"
    assert "compiled operators are for another torch" in check.found


def test_what_a_look_raises_is_a_line_too():
    def look():
        yield Check("disk", "ok", "fine")
        raise PermissionError("no")

    assert [check.status for check in guarded("disk", look)] == ["ok", "fail"]


def test_without_torch_everything_is_still_said():
    """Not even the top of the file may need what may be missing."""
    script = (
        "import sys, json; sys.modules['torch'] = None\n"
        "from asymlift.stages.doctor.table import examine, as_json\n"
        "print(json.dumps(as_json(examine())))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert result.stderr == ""
    document = json.loads(result.stdout)
    status = {check["name"]: check for check in document["checks"]}
    assert document["fit"] is False
    assert "does not import: ModuleNotFoundError" in status["torch"]["found"]
    assert status["numpy"]["status"] in ("ok", "warn")
    assert "disk" in status


# ---- what computes -----------------------------------------------------------------------------


def test_a_driver_beside_a_cpu_build_of_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_machine, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    check = only(doctor_machine.accelerator)
    assert check.status == "fail"
    assert "built for the CPU" in check.found

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = only(doctor_machine.accelerator)
    assert (check.status, "sees no GPU" in check.found) == ("fail", True)


def test_a_machine_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_machine, "DRIVER", tmp_path / "none")
    check = only(doctor_machine.accelerator)
    assert check.status == "warn"
    assert "finetuning a large model needs GPUs" in check.remedy


@pytest.mark.parametrize(
    ("major", "free", "total", "status", "said"),
    [
        (9, 139, 140, "ok", ""),
        (7, 30, 32, "warn", "precision: float32"),
        (9, 20, 140, "warn", "another process"),
        (8, 11, 12, "warn", "too small"),
    ],
)
def test_gpus(monkeypatch, major, free, total, status, said):
    properties = SimpleNamespace(name="NVIDIA X", major=major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free * GIB, total * GIB))
    checks = list(doctor_machine.accelerator())
    assert [check.name for check in checks] == ["GPU 0", "GPU 1"]
    assert checks[0].status == status
    assert f"{total:.1f} GiB" in checks[0].found
    assert said in checks[0].remedy


def test_deepspeed_on_another_accelerator_than_torch(monkeypatch):
    only(doctor_machine.deepspeed_accelerator)  # imported, so that there is something to patch
    import deepspeed.accelerator

    monkeypatch.setattr(
        deepspeed.accelerator, "get_accelerator", lambda: SimpleNamespace(_name="xpu")
    )
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    check = only(doctor_machine.deepspeed_accelerator)
    assert check.status == "fail"
    assert check.remedy == "unset DS_ACCELERATOR"


def test_a_lock_that_a_killed_build_left_behind(tmp_path):
    operator = tmp_path / "extensions" / "py311_cpu" / "deepspeed_shm_comm"
    operator.mkdir(parents=True)
    (operator / "lock").touch()
    assert [check.status for check in doctor_machine.compiled_operators()] == ["ok", "warn"]

    os.utime(operator / "lock", (0, time.time() - 3600))
    stale = list(doctor_machine.compiled_operators())[1]
    assert stale.status == "fail"
    assert "60 minutes old" in stale.found
    assert stale.remedy.startswith(f"rm {operator / 'lock'}")


def test_collectives(monkeypatch):
    assert only(doctor_machine.collectives).found == "gloo"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert only(doctor_machine.collectives).status == "fail"

    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    assert only(doctor_machine.collectives).found == "NCCL 2.27.5"


# ---- what a recipe names -----------------------------------------------------------------------


def test_perceptual_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    [(_, look)] = doctor_recipe.looks(None)
    assert only(look).status == "warn"
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "vgg16-397923af.pth").touch()
    assert only(look).status == "ok"


def test_what_a_recipe_names_is_looked_for(tmp_path):
    """A base, data and weights that are there, and ones that are not; nothing is written."""
    (tmp_path / "a.tar").touch()
    values = {
        "name": "x",
        "runs": str(tmp_path / "runs"),
        "model": {"base": "embedded:tiny"},
        "data": {"train": str(tmp_path / "a.tar")},
        "finetune": {"loss": {"perceptual": {"weights": str(tmp_path / "gone.pth")}}},
    }

    def found() -> dict[str, Check]:
        looks = doctor_recipe.looks(check_recipe(values, "recipe"))
        return {c.name: c for name, look in looks for c in guarded(name, look)}

    checks = found()
    assert checks["base model"].found.endswith("flux2, patch 8, d 16, D 192")
    assert checks["training data"].found == f"1 sources, the first is {tmp_path / 'a.tar'}"
    assert "GiB free" in checks["run folder"].found
    assert checks["perceptual weights"].found == f"{tmp_path / 'gone.pth'} is not there"
    assert checks["perceptual weights"].status == "fail"
    assert checks["asked for"].status == "ok"
    assert "validation data" not in checks
    assert not (tmp_path / "runs").exists()

    values["model"] = {"base": str(tmp_path / "none")}
    values["data"] = {"train": str(tmp_path / "{a,b}.tar"), "validation": str(tmp_path / "c.tar")}
    values["finetune"] = {"preview": {"prompts": str(tmp_path / "none.txt")}}
    checks = found()
    assert "none.txt is no file" in checks["asked for"].found
    assert "c.tar" in checks["validation data"].found
    assert "no such folder" in checks["base model"].found
    assert checks["training data"].found == f"1 of 2 are not there: {tmp_path / 'b.tar'}"
    assert {checks[name].status for name in ("base model", "training data")} == {"fail"}
    assert {checks[name].status for name in ("validation data", "asked for")} == {"fail"}

    values["data"] = {"train": "pipe:cat x", "mode": "stream"}
    assert "streamed" in found()["training data"].found


def test_a_run_folder_that_cannot_be_written_is_a_failure(tmp_path):
    (tmp_path / "runs").touch()  # a file where a folder should be
    values = {"name": "x", "runs": str(tmp_path / "runs"), "model": {"base": "embedded:tiny"}}
    recipe = check_recipe(values | {"data": {"train": "a.tar"}}, "recipe")
    [check] = doctor_recipe.run_folder(recipe)
    assert check.status == "fail"
    assert check.found == f"{tmp_path / 'runs'} cannot be written to (Not a directory)"


def test_what_a_look_finds_wrong_in_a_recipe_is_said_as_it_is():
    def look():
        raise BadData("this and that")
        yield

    assert guarded("x", look) == [Check("x", "fail", "this and that")]


# ---- what it computes with ---------------------------------------------------------------------


@pytest.mark.parametrize(("free", "status"), [(100, "ok"), (1, "warn")])
def test_disk_and_shared_memory(monkeypatch, free, status):
    usage = SimpleNamespace(free=free * GIB, total=free * GIB / 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert only(doctor_machine.disk).status == status
    assert only(doctor_machine.shared_memory).status == status


def test_a_container_has_less_memory_than_its_machine(monkeypatch, tmp_path):
    monkeypatch.setattr("asymlift.runtime.memory.GROUPS", tmp_path)
    monkeypatch.setattr("asymlift.runtime.memory.OWN_GROUPS", tmp_path / "none")
    (tmp_path / "memory.max").write_text("max\n")
    assert "container" not in only(doctor_machine.memory).found
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    check = only(doctor_machine.memory)
    assert check.status == "warn"
    assert check.found.startswith("1.0 GiB for this container")


@pytest.mark.parametrize(("soft", "status"), [(256, "warn"), (65536, "ok")])
def test_open_files(monkeypatch, soft, status):
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda what: (soft, 1 << 20))
    assert only(doctor_machine.open_files).status == status


@pytest.mark.parametrize(
    ("variables", "status", "said"),
    [
        ({}, "ok", "none: one process"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "ok", "rank 1 of 4"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "fail", "not LOCAL_RANK"),
        ({"SLURM_NTASKS": "8"}, "ok", "none: one process"),
    ],
)
def test_launcher(monkeypatch, variables, status, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check = only(doctor_machine.launcher)
    assert check.status == status
    assert said in check.found


def test_every_extra_that_is_named_to_users_exists():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for name, (extra, _) in EXTRAS.items():
        assert any(line.startswith(name) for line in extras[extra])
    for family in FAMILIES.values():
        for name, source in family.needs.items():
            assert source == f"asymlift[{EXTRAS[name][0]}]"

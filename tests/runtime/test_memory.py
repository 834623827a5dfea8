"""The memory that can be taken is that of the machine or of a control group, whichever is less."""

import pytest

from asymlift.runtime import memory

MIB = 2**20


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write files of a machine with 100 MiB available; return what writes more."""
    for name in ("MEMINFO", "OWN_GROUPS", "GROUPS"):
        monkeypatch.setattr(memory, name, tmp_path / name)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    write("MEMINFO", f"MemTotal: {300 * 1024} kB\nMemAvailable: {100 * 1024} kB")
    return write


def test_without_limits_it_is_what_the_machine_has(files):
    assert memory.available_memory() == 100 * MIB
    files("GROUPS/memory.max", "max")
    assert memory.available_memory() == 100 * MIB
    assert memory.container_limit() is None


def test_a_container_has_its_limit_less_what_it_uses(files):
    files("GROUPS/memory.max", 50 * MIB)
    files("GROUPS/memory.current", 20 * MIB)
    assert memory.available_memory() == 30 * MIB
    assert memory.container_limit() == 50 * MIB


def test_files_in_the_cache_are_not_used_memory(files):
    """Hashing the base has just filled the cache with it."""
    files("GROUPS/memory.max", 50 * MIB)
    files("GROUPS/memory.current", 48 * MIB)
    files("GROUPS/memory.stat", f"anon {MIB}\nactive_file {10 * MIB}\ninactive_file {30 * MIB}")
    assert memory.available_memory() == 42 * MIB


def test_a_container_cannot_give_more_than_the_machine_has(files):
    files("GROUPS/memory.max", 500 * MIB)
    files("GROUPS/memory.current", 0)
    assert memory.available_memory() == 100 * MIB


def test_more_in_use_than_allowed_leaves_nothing(files):
    files("GROUPS/memory.max", 50 * MIB)
    files("GROUPS/memory.current", 60 * MIB)
    assert memory.available_memory() == 0


def test_the_older_control_groups_count_too(files):
    files("OWN_GROUPS", "5:cpu:/\n4:memory:/docker/3e4c\n0::/")
    files("GROUPS/memory/memory.limit_in_bytes", 50 * MIB)
    files("GROUPS/memory/memory.usage_in_bytes", 20 * MIB)
    files("GROUPS/memory/memory.stat", f"inactive_file 0\ntotal_inactive_file {5 * MIB}")
    assert memory.available_memory() == 35 * MIB
    assert memory.container_limit() == 50 * MIB


@pytest.mark.parametrize("tightest", ["", "job_7", "job_7/step_0"])
def test_the_tightest_of_nested_groups_counts(tightest, files):
    """A batch system limits the job, and leaves the step in it without a limit."""
    files("OWN_GROUPS", "0::/job_7/step_0")
    for group in ("", "job_7", "job_7/step_0"):
        files(f"GROUPS/{group}/memory.max", 40 * MIB if group == tightest else "max")
    assert memory.available_memory() == memory.container_limit() == 40 * MIB


def test_a_group_outside_of_what_can_be_seen_is_left_out(files):
    files("OWN_GROUPS", "0::/../../elsewhere")
    files("GROUPS/memory.max", 40 * MIB)
    assert memory.container_limit() == 40 * MIB


def test_without_proc_it_is_what_the_machine_was_built_with(tmp_path, files):
    (tmp_path / "MEMINFO").unlink()
    assert memory.available_memory() > MIB


def test_the_peak_is_at_least_what_was_held_and_does_not_fall():
    before = memory.peak_of_process()
    block = bytearray(before // 2 + 64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    held = len(block)
    del block
    assert memory.peak_of_process() >= max(before, held)

"""What ZeRO holds: sums, shares and peaks."""

from dataclasses import replace

import pytest

from asymlift.maths.zero_memory import Point, Weights, ZeroSettings, zero_memory

WEIGHTS = Weights(frozen=8000, groups=(900, 100), largest=400, gathered=500)
SETTINGS = ZeroSettings(stage=0, world=4, accumulation=1, bucket=5000, state_bytes=8.0)
P = 4000  # bytes of all that trains


def held(stage, **changes):
    return zero_memory(WEIGHTS, replace(SETTINGS, stage=stage, **changes), "cuda")


def test_without_zero_every_rank_holds_everything():
    assert held(0).resident == 8000 + P + 2 * P
    assert held(0, world=1) == held(0)


@pytest.mark.parametrize("stage", [1, 2])
def test_split_states_leave_weights_whole_and_add_a_second_copy_of_a_share(stage):
    assert held(stage).resident == 8000 + P + P // 4 + 2 * P // 4


def test_stage_3_splits_everything_but_the_bucket():
    assert held(3).resident == (8000 + P + P + 2 * P + P) // 4 + 4 * 5000


@pytest.mark.parametrize("stage", range(4))
def test_shares_shrink_with_the_ranks(stage):
    sizes = [held(stage, world=world).resident for world in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0] > sizes[-1]) == (stage > 0)


def test_gradients_wait_between_micro_batches():
    assert [held(stage, accumulation=2).waiting for stage in (0, 2, 3)] == [P, P // 4, 0]
    assert held(1, accumulation=2).waiting == P + 4 * 5000  # with the bucket they will fill
    assert [held(stage).waiting for stage in range(4)] == [0, 0, 0, 0]


def test_whole_gradients_grow_while_activations_go():
    curve = [Point(10_000, 0), Point(7_000, 2_000), Point(9_000, 3_000)]
    assert held(0).pass_peak(curve) == 12_000
    few = [Point(100, 0)]
    assert held(0).pass_peak(few) == 2 * P  # the gradients, and the copy that is reduced


def test_the_bucket_of_stage_2_is_made_with_the_first_gradient():
    before, after = [Point(30_000, 0)], [Point(30_000, 0), Point(29_000, 400)]
    assert held(2).pass_peak(before) == 30_000
    assert held(2).pass_peak(after) == 29_000 + 4 * 5000


def test_a_bucket_smaller_than_the_model_is_reduced_on_the_way():
    small = held(2, bucket=500)
    assert small.from_first_gradient == 2000 + 2000 + P // 4  # it, its copy, the share's gradients


def test_offload_moves_to_the_host_what_it_says():
    kept, moved = held(2), held(2, offload="optimizer")
    assert moved.optimizer == moved.master == moved.update == 0
    assert moved.host == kept.master + kept.optimizer + 2 * P // 4
    everything = held(3, offload="all")
    assert everything.resident == 4 * 5000 + 4 * 400
    assert everything.host == (8000 + P + P + 2 * P + 2 * P) // 4


def test_gradients_that_travel_low_take_a_copy_and_a_bucket_each():
    both = held(3, dtypes=(2, 4))
    assert both.buffers == 5000 * 6
    assert both.reduce - held(3).reduce == 2 * 1000


def test_a_cpu_needs_room_for_roots_beside_the_gradients_of_later_groups():
    on_cpu = zero_memory(WEIGHTS, replace(SETTINGS, stage=2), "cpu")
    assert on_cpu.update == (P + 3600 + 3600) // 4
    assert held(2).update == (P + 3600) // 4
    alone = zero_memory(replace(WEIGHTS, groups=(1000,)), replace(SETTINGS, stage=2), "cpu")
    assert alone.update == (P + P) // 4  # gradients and flat, then flat and roots

"""Each family takes steps in the engine that `finetune` runs: bf16, LoRA, checkpointing, ZeRO."""

from typing import Any

import pytest
import torch

from asymlift.families import FAMILIES
from asymlift.families.base import trained_in_full
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.parameters import local_shard
from asymlift.runtime.signals import StopRequest
from tests.stages.finetune.trainer_checks import trainer_for

ALONE = Ranks(0, 1, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lifted_model_trains(name, tmp_path):
    """All that a recipe trains by default moves, and every loss is a number."""
    dist.join(ALONE, torch.device("cpu"), timeout=60)
    family = FAMILIES[name]
    trainer = trainer_for(
        2,
        ALONE,
        tmp_path,
        name,
        precision="bfloat16",
        gradient_checkpointing=True,
        variance_every=0,
    )
    parameters = trainer.engine.trainable.parameters
    before = {path: local_shard(p).clone() for path, p in parameters.items()}

    data: Any = trainer.training
    lines = [trainer.take(step, data, StopRequest())[0] for step in range(2)]

    assert all(0 < line["loss"] < 1e6 and 0 < line["grad_norm"] < 1e6 for line in lines)
    still = [p for p, old in before.items() if torch.equal(local_shard(parameters[p]), old)]
    assert not still
    for whole in trained_in_full(family).values():
        assert any(path.startswith(f"{whole}.") for path in before)
    assert sum("lora_A" in path for path in before) >= 2

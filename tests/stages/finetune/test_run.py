"""finetune with DeepSpeed for real: stages, ranks, kills, signals and what is refused.

Processes take seconds to start, so each of them does several runs.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asymlift.artifacts.checkpoint import open_checkpoint, steps_on_disk
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.safetensors_stream import load_tensors
from asymlift.data.catalog import indexed
from asymlift.data.pictures import encode_picture, encode_png, float_to_image
from asymlift.data.reader import Reader
from asymlift.data.records import Sample
from asymlift.data.writer import write_shard
from asymlift.embedded.scenes import caption, make_scenes
from asymlift.errors import BadData, BadRecipe, CannotWrite, Exit, StoppedEarly
from asymlift.recipe import load_recipe
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import Engine
from asymlift.stages.finetune.data import Encoders
from asymlift.stages.finetune.run import Run, finetune
from asymlift.stages.finetune.start import Start, accumulation_for
from asymlift.stages.inspection.model import inspect_path
from asymlift.stages.verbs import describe_finetune
from asymlift.stages.verify import verify
from tests.stages.small_run import LORA, another_run, build, drive

ALONE = Ranks(0, 1, 0)
# The norm that clipping divides by is summed in another order at every stage: 1e-7 apart.
UNCLIPPED = "finetune.clip.norm=1000"
UNCLIPPED_LORA = [*LORA, UNCLIPPED]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(recipe):
    """One process: every stage in full, LoRA, and runs that were cut and changed stage."""
    jobs = {
        f"full-{stage}": [another_run(recipe, f"full-{stage}"), f"finetune.zero.stage={stage}"]
        for stage in range(4)
    }
    jobs |= {
        f"lora-{stage}": [
            another_run(recipe, f"lora-{stage}"),
            f"finetune.zero.stage={stage}",
            *UNCLIPPED_LORA,
        ]
        for stage in (0, 3)
    }
    jobs["unclipped"] = [another_run(recipe, "unclipped"), UNCLIPPED]
    for before, after in ((3, 1), (0, 3), (2, 0)):
        name = f"cut-{before}-{after}"
        run = [another_run(recipe, name), *UNCLIPPED_LORA]
        jobs[f"{name}-start"] = [*run, f"finetune.zero.stage={before}", "finetune.steps=5"]
        jobs[name] = [*run, f"finetune.zero.stage={after}"]
    results, codes, said = drive(recipe, list(jobs.values()))
    assert codes == [0], said[0]
    return dict(zip(jobs, results, strict=True))


@pytest.fixture(scope="module")
def pair(recipe):
    """Two ranks: stages 1, 2, 3 in full, and LoRA at stages 2 and 3; unclipped."""
    jobs = {
        f"full-{stage}": [
            another_run(recipe, f"pair-{stage}"),
            f"finetune.zero.stage={stage}",
            UNCLIPPED,
        ]
        for stage in (1, 2, 3)
    }
    jobs |= {
        f"lora-{stage}": [
            another_run(recipe, f"pair-lora-{stage}"),
            f"finetune.zero.stage={stage}",
            *UNCLIPPED_LORA,
        ]
        for stage in (2, 3)
    }
    results, codes, said = drive(recipe, list(jobs.values()), ranks=2)
    assert codes == [0, 0], said
    return dict(zip(jobs, results, strict=True))


def losses(result):
    return [line["loss"] for line in result["metrics"]]


def test_every_zero_stage_trains_the_same_weights(alone):
    """To the last bit; clipped, stage 0 apart, which sums the norm in another order."""
    for stage in (2, 3):
        assert alone[f"full-{stage}"]["digests"] == alone["full-1"]["digests"]
    assert losses(alone["full-1"]) == pytest.approx(losses(alone["full-0"]), rel=1e-5)
    assert alone["lora-3"]["digests"] == alone["lora-0"]["digests"]
    norms = [[line["grad_norm"] for line in alone[f"full-{s}"]["metrics"]] for s in range(4)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[3] == pytest.approx(norms[0], rel=1e-5)


def test_two_ranks_train_as_one(alone, pair):
    for stage in (1, 2, 3):
        assert losses(pair[f"full-{stage}"]) == pytest.approx(losses(alone["unclipped"]), rel=1e-5)


def test_two_ranks_at_different_stages_are_equal(pair):
    assert pair["full-1"]["digests"] == pair["full-2"]["digests"] == pair["full-3"]["digests"]
    assert pair["lora-2"]["digests"] == pair["lora-3"]["digests"]


@pytest.mark.parametrize("name", ["cut-3-1", "cut-0-3", "cut-2-0"])
def test_a_run_goes_on_at_another_stage_bit_for_bit(alone, name):
    assert alone[name]["resumed_from"] == 5
    assert losses(alone[name]) == losses(alone["lora-0"])
    assert alone[name]["digests"] == alone["lora-0"]["digests"]


def test_training_lowers_the_loss_and_follows_the_schedule(alone):
    metrics = alone["full-2"]["metrics"]

    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert [line["lr"] for line in metrics][:3] == [5e-4, 1e-3, 1e-3]
    assert all(0 < line["control"] < 1 for line in metrics)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_stopped_killed_and_resumed_it_ends_with_the_same_bytes(recipe, pair, stage):
    """SIGTERM to one rank in step 2, kill -9 of another in step 6, then to the end."""
    job = [another_run(recipe, f"hunted-{stage}"), f"finetune.zero.stage={stage}", *UNCLIPPED_LORA]

    _, codes, said = drive(recipe, [job], ranks=2, send="1 1 SIGTERM")
    assert codes == [Exit.RESUMABLE] * 2, said
    assert "after step" in said[0]
    assert "saved; run the same command again" in said[0]
    stopped_at = steps_on_disk(recipe.parent / f"hunted-{stage}" / "checkpoints")[0]
    assert stopped_at in (2, 3)  # at once, or in the step that had begun

    _, codes, _ = drive(recipe, [job], ranks=2, send="1 6 SIGKILL")
    assert codes[1] == -9
    assert codes[0] != 0

    [result], codes, said = drive(recipe, [job], ranks=2)
    assert codes == [0, 0], said
    assert result["resumed_from"] == 6
    assert losses(result) == losses(pair[f"lora-{stage}"])
    assert result["digests"] == pair[f"lora-{stage}"]["digests"]


def test_a_checkpoint_is_whole_named_and_portable(recipe, alone):
    folder = recipe.parent / "lora-0" / "checkpoints" / "step-000008"
    checkpoint = open_checkpoint(folder)
    trained, ema = (load_tensors(folder / f"{part}.safetensors") for part in ("trainable", "ema"))

    assert checkpoint.state["lora"] == {"rank": 4, "alpha": 8.0}
    assert trained.keys() == ema.keys() == {name for name, *_ in checkpoint.state["parameters"]}
    assert {"x_embedder.weight", "proj_out.weight", "norm_out.linear.weight"} <= trained.keys()
    assert all(tensor.dtype.is_floating_point and tensor.numel() for tensor in trained.values())
    assert not verify(folder).problems
    assert inspect_path(folder).kind == "checkpoint"
    assert steps_on_disk(folder.parent) == [8, 6]  # keep: 2


def test_a_finished_run_says_so_and_changes_nothing(recipe, alone, capfd):
    before = (recipe.parent / "full-2" / "metrics.jsonl").read_bytes()
    overrides = ["name=full-2", "finetune.zero.stage=2"]

    finetune(load_recipe(recipe, [*overrides, "finetune.steps=6"]), ALONE)
    assert "finetune.steps is 6, and 8 are taken already" in capfd.readouterr().err
    report = finetune(load_recipe(recipe, overrides), ALONE)

    assert (report.step, report.resumed_from, report.last) == (8, 8, {})
    assert (recipe.parent / "full-2" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("finetune.seed=1", "finetune.seed 0 -> 1;\nthat cannot change in a run"),
        ("finetune.train={lora: null}", "finetune.train full -> "),
    ],
)
def test_what_cannot_change_in_a_run_is_refused(recipe, alone, override, said):
    overrides = ["name=full-0", "finetune.steps=9", "finetune.zero.stage=0", override]
    if "train" in override:
        overrides.append("finetune.loss.reference=shared")

    with pytest.raises(BadData, match=said):
        finetune(load_recipe(recipe, overrides), ALONE)


def test_other_data_needs_a_flag_and_is_then_trained_on(recipe, alone, capfd):
    name = another_run(recipe, "other-data")
    shutil.copytree(
        recipe.parent / "full-0" / "checkpoints", recipe.parent / name[5:] / "checkpoints"
    )
    one_shard = f"data.train={recipe.parent}/shards/000000.tar"
    use = load_recipe(recipe, [name, "finetune.steps=9", "finetune.zero.stage=0", one_shard])

    with pytest.raises(BadData, match=r"the training data \(from here on, .* another order\)"):
        finetune(use, ALONE)
    report = finetune(use, ALONE, Start(allow_changes=True))

    assert (report.resumed_from, report.step) == (8, 9)
    assert "allowed by --allow-changes" in capfd.readouterr().err


def test_what_may_change_is_said_and_rules(recipe, alone, capfd, monkeypatch):
    """Not the values that the optimizer had when it was saved."""
    name = another_run(recipe, "changed")
    shutil.copytree(recipe.parent / "full-0" / "checkpoints", recipe.parent / "changed/checkpoints")
    values = "{lr: 5e-4, betas: [0.7, 0.8], weight_decay: 0.25, lr_scale: {}}"
    overrides = [name, "finetune.steps=9", f"finetune.optimizer={values}", "finetune.zero.stage=1"]
    update, used = Engine.update, dict[str, Any]()

    def note(engine: Engine, *args: Any) -> float:
        norm = update(engine, *args)
        used.update(engine.optimizer.param_groups[0])
        return norm

    monkeypatch.setattr(Engine, "update", note)
    report = finetune(load_recipe(recipe, overrides), ALONE)

    assert (report.resumed_from, report.last["lr"]) == (8, 5e-4)
    assert (used["lr"], used["betas"], used["weight_decay"]) == (5e-4, (0.7, 0.8), 0.25)
    said = capfd.readouterr().err
    assert "resumed from" in said and "ZeRO 0 on 1 rank -> ZeRO 1 on 1 rank" in said
    for line in ("finetune.optimizer.lr", "finetune.optimizer.betas", "finetune.zero.stage"):
        assert line in said


def test_a_damaged_newest_checkpoint_is_left_out_loudly(recipe, alone, capfd):
    name = another_run(recipe, "damaged")
    shutil.copytree(recipe.parent / "full-0" / "checkpoints", recipe.parent / "damaged/checkpoints")
    shutil.copy(recipe.parent / "full-0" / "metrics.jsonl", recipe.parent / "damaged")
    newest = recipe.parent / "damaged/checkpoints/step-000008/trainable.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))

    report = finetune(load_recipe(recipe, [name, "finetune.zero.stage=0"]), ALONE)

    assert report.resumed_from == 6
    said = capfd.readouterr().err
    assert "left out, it is damaged" in said
    assert "trainable.safetensors" in said
    assert "2 steps of an earlier start, not saved, will be taken again" in said
    whole = recipe.parent / "full-0/checkpoints/step-000008/trainable.safetensors"
    assert newest.read_bytes() == whole.read_bytes()  # the step was taken again


def test_too_many_bad_samples_end_the_run_with_their_names(recipe, tmp_path):
    name = another_run(recipe, "bad-data")
    shards = tmp_path / "shards"
    shutil.copytree(recipe.parent / "shards", shards)
    tar = shards / "000000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"IDAT", b"IDAX"))  # every picture of the shard
    overrides = [name, f"data.train={shards}/{{000000..000001}}.tar", "data.max_bad_fraction=0.003"]

    with pytest.raises(BadData, match=r"samples are bad, more than data\.max_bad_fraction 0\.003"):
        finetune(load_recipe(recipe, overrides), ALONE)

    logs = recipe.parent / "bad-data" / "logs"
    told = (logs / "rank-0.log").read_text()  # how it began, and how it ended
    assert "parameters train, 8 steps of 8" in told
    assert "samples are bad" in told
    [log] = logs.glob("skipped-*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all("000000.tar!" in line["sample"] for line in lines)
    assert {line["reason"] for line in lines} == {"changed since it was indexed"}


def test_a_batch_that_the_ranks_cannot_share_is_refused(recipe):
    settings = load_recipe(recipe).finetune
    assert accumulation_for(settings, Ranks(0, 2, 0)) == 1

    with pytest.raises(BadRecipe, match="not a multiple of micro_batch 4 x 3 ranks"):
        accumulation_for(settings, Ranks(0, 3, 0))


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(recipe):
    preview = "finetune.preview={every: 2, prompts: [a red disc], steps: 2, guidance: 1.0}"
    overrides = [another_run(recipe, "odd"), preview, "sample.height=30"]

    with pytest.raises(BadRecipe, match=r"sample\.height 30: .* multiples of 8"):
        finetune(load_recipe(recipe, overrides), ALONE)


def test_pictures_that_cannot_be_written_before_the_first_step_end_it(recipe):
    preview = "finetune.preview={every: 2, prompts: [a red disc], steps: 2}"
    overrides = [another_run(recipe, "unwritable"), preview]
    (recipe.parent / "unwritable" / "samples").touch()  # a file where a folder should be

    with pytest.raises(CannotWrite, match="samples/base: cannot write here"):
        finetune(load_recipe(recipe, overrides), ALONE)


def test_previews_show_base_lifted_and_now(recipe):
    preview = "finetune.preview={every: 2, prompts: [a red disc, a teal cross], steps: 4}"
    overrides = [another_run(recipe, "shown"), preview, "finetune.steps=2", *LORA]

    finetune(load_recipe(recipe, overrides), ALONE)

    samples = recipe.parent / "shown" / "samples"
    names = {path.relative_to(samples).as_posix() for path in samples.rglob("*.png")}
    rows = ("base", "lifted", "step-000000", "step-000002")
    expected = {f"{row}/{number:04d}.png" for row in rows for number in range(2)}
    assert names == expected | {"step-000000/grid.png", "step-000002/grid.png"}
    assert (samples / "lifted/0000.png").read_bytes() == (
        samples / "step-000000/0000.png"
    ).read_bytes()
    assert (recipe.parent / "shown" / "report.html").stat().st_size > 10_000

    grid = samples / "step-000002/grid.png"
    drawn = grid.read_bytes()
    grid.unlink()  # killed between the save and the pictures
    assert finetune(load_recipe(recipe, overrides), ALONE).resumed_from == 2
    assert grid.read_bytes() == drawn


def test_maps_and_what_trains_stay_float32_after_the_engine_has_started(recipe):
    name = another_run(recipe, "dtypes")
    dist.join(ALONE, torch.device("cpu"), timeout=60)
    for stage in (2, 3):
        use = load_recipe(recipe, [name, *LORA, f"finetune.zero.stage={stage}"])
        run = Run(use, ALONE, torch.device("cpu"), accumulation_for(use.finetune, ALONE), {})
        student = run.step_module.student
        frozen = {
            parameter.dtype
            for path, parameter in student.net.named_parameters()
            if "transformer_blocks" in path and "lora" not in path
        }
        maps = [student.net.get_submodule(p) for p in (run.family.first, run.family.last)]

        assert student.A.dtype == torch.float32
        assert {p.dtype for p in run.trainable.parameters.values()} == {torch.float32}
        assert {p.dtype for twin in maps for p in twin.parameters()} == {torch.float32}
        assert frozen == {torch.bfloat16}  # as the base stores them


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_full_run_in_bfloat16_keeps_float32_weights(recipe, alone, stage):
    overrides = [another_run(recipe, f"full-bf16-{stage}"), "finetune.precision=bfloat16"]
    overrides += [f"finetune.zero.stage={stage}", "finetune.steps=2"]

    report = finetune(load_recipe(recipe, overrides), ALONE)

    trained = load_tensors(report.checkpoint / "trainable.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert report.last["loss"] == pytest.approx(alone["full-0"]["metrics"][1]["loss"], rel=0.03)


def samples_of(recipe: Path, number: int = 0) -> list[Sample]:
    """What a shard holds, in memory."""
    reader, shard = Reader(), indexed(recipe.parent / "shards" / f"{number:06d}.tar")
    return [reader.read(shard.record(index)) for index in range(len(shard))]


def test_what_is_not_cached_is_encoded_while_training(recipe, alone, tmp_path):
    """Pictures and captions alone, or with some of it cached, give the losses of the cache."""
    for number in range(2):
        read = samples_of(recipe, number)
        bare = [Sample(sample.key, sample.image, sample.caption) for sample in read]
        write_shard(tmp_path / "bare" / f"{number:06d}.tar", bare)
        for position, sample in enumerate(read):
            sample.latent = sample.latent if position % 2 else None
            sample.text = sample.text if position % 3 else None
        write_shard(tmp_path / "mixed" / f"{number:06d}.tar", read)
    overrides = ["finetune.steps=3", "data.resize.sides=[32]"]
    bare, mixed = (f"data.train={tmp_path / name}" for name in ("bare", "mixed"))

    refused = [another_run(recipe, "refused"), bare, *overrides]
    with pytest.raises(BadData, match="no text embedding"):
        finetune(
            load_recipe(recipe, [*refused, "data.text=cached", "data.max_bad_fraction=0"]), ALONE
        )
    for name, more in (("bare", [bare]), ("mixed", [mixed]), ("new", [mixed, "data.text=online"])):
        use = load_recipe(recipe, [another_run(recipe, f"online-{name}"), *overrides, *more])
        report = finetune(use, ALONE)

        cached = alone["full-0"]["metrics"][2]
        assert report.last["loss"] == pytest.approx(cached["loss"], rel=1e-3)
        assert report.last["control"] == pytest.approx(cached["control"], rel=1e-3)
        assert report.bad_samples == {}


def write_pictures(folder: Path, count: int, sizes: list[tuple[int, int]]) -> None:
    """Scenes cut to sizes (height, width), as PNG files with captions beside them."""
    scenes = make_scenes(range(count), seed=1, size=64)
    for number, image in enumerate(float_to_image(scenes.image * 2 - 1)):
        height, width = sizes[number % len(sizes)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.png").write_bytes(encode_png(image[:, :height, :width]))
        (folder / f"{number:03d}.txt").write_text(caption(scenes.labels[number]))


SIZES = [(32, 32), (64, 64), (30, 50), (40, 64), (47, 45), (26, 41)]


def test_a_folder_of_pictures_trains_as_it_is(recipe, tmp_path):
    """Of all sizes and aspects, on two ranks as on one; one size has no picture that is sound."""
    write_pictures(tmp_path / "pictures", 40, SIZES)
    write_pictures(tmp_path / "pictures" / "small", 2, [(12, 12)])
    broken = encode_picture(torch.randint(256, (3, 40, 24), dtype=torch.uint8), "jpeg", 90)[:-200]
    for number in range(8):
        (tmp_path / "pictures" / f"broken-{number}.jpg").write_bytes(broken)
    job = [
        f"data.train={tmp_path / 'pictures'}",
        "data.resize={sides: [32], step: 8}",
        "data.max_bad_fraction=0.5",
        "finetune.checkpoint.every=100",
    ]
    found = {}
    for ranks in (1, 2):
        name = another_run(recipe, f"folder-{ranks}")
        [found[ranks]], codes, said = drive(recipe, [[name, *job]], ranks=ranks)
        assert codes == [0] * ranks, said
        assert "too small" in said[0]

    for result in found.values():
        assert len(result["metrics"]) == 8  # more than an epoch: every size came up
        assert all(math.isfinite(loss) for loss in losses(result))
        [empty] = [line for line in result["metrics"] if line["loss"] == 0]
        assert empty["lr"] == 0  # nobody had a sample in that step, so nothing moved
        assert result["bad_samples"] == {"image cannot be decoded": 8}
    assert losses(found[2]) == pytest.approx(losses(found[1]), rel=1e-4)
    logs = (recipe.parent / "folder-2" / "logs").glob("skipped-*.jsonl")
    lines = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    assert len({line["sample"] for line in lines}) == len(lines) == 8


@pytest.mark.parametrize("text", ["cached", "auto"])
def test_shards_that_can_only_be_streamed(recipe, tmp_path, text):
    """Through pipes, on two ranks; a shard that is cut off costs its own samples; it goes on."""
    shards = sorted((recipe.parent / "shards").glob("*.tar"))
    (tmp_path / "cut.tar").write_bytes(shards[0].read_bytes()[:20000])
    urls = [f"pipe:cat {path}" for path in [*shards, tmp_path / "cut.tar"]]
    name = another_run(recipe, f"stream-{text}")
    job = [
        name,
        "data.mode=stream",
        f"data.text={text}",
        f"data.train={json.dumps(urls)}",
        "data.resize={sides: [32]}",
        "data.max_bad_fraction=0.5",
    ]
    results, codes, said = drive(recipe, [[*job, "finetune.steps=4"], job], ranks=2)
    assert codes == [0, 0], said
    assert "data.mode: stream reads shards from front to back" in said[0]
    assert "3 shards, streamed" in said[0]
    assert results[1]["resumed_from"] == 4 and len(results[1]["metrics"]) == 8
    assert all(math.isfinite(loss) and loss > 0 for loss in losses(results[1]))
    assert "shard is cut off" in results[1]["bad_samples"]


def test_a_stream_needs_a_shard_for_every_rank(recipe):
    job = [another_run(recipe, "stream-few"), "data.mode=stream", "data.train=pipe:cat nothing"]
    _, codes, said = drive(recipe, [job], ranks=2)
    assert codes == [65, 65]
    assert all("a shard for every rank: 1 for 2 ranks" in text for text in said)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda tar: b"no tar", "no usable sample in 1 shards"),
        (lambda tar: tar.replace(b"IDAT", b"IDAX"), "samples are bad, more than"),
    ],
)
def test_a_stream_that_fails_on_one_rank_ends_all(recipe, tmp_path, content, expected):
    """With the same message, and soon: the others wait for the sums of a step."""
    shards = sorted((recipe.parent / "shards").glob("*.tar"))
    (tmp_path / "bad.tar").write_bytes(content(shards[0].read_bytes()))
    job = [
        another_run(recipe, "stream-fails"),
        "data.mode=stream",
        f"data.train={json.dumps([str(shards[1]), str(tmp_path / 'bad.tar')])}",
        "data.resize={sides: [32]}",
        "finetune.steps=1000",
        "finetune.checkpoint.every=1000",
    ]
    _, codes, said = drive(recipe, [job], ranks=2)
    assert codes == [Exit.BAD_DATA, Exit.BAD_DATA], said
    assert all(expected in text and "Traceback" not in text for text in said)


def test_classes_train_instead_of_captions(recipe, tmp_path, monkeypatch):
    """The class is the prompt, also where embeddings of captions are cached."""
    read = samples_of(recipe)
    for number, sample in enumerate(read):
        sample.facts = {"label": number % 3, "class": f"kind {number % 3}"}
    write_shard(tmp_path / "000000.tar", read)
    asked = set()
    encode = Encoders.captions

    def note(self: Encoders, prompts: list[str]) -> list[dict[str, torch.Tensor]]:
        asked.update(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(Encoders, "captions", note)
    data = [f"data.train={tmp_path}/000000.tar", "data.caption.source=class"]
    finetune(
        load_recipe(recipe, [another_run(recipe, "classes"), *data, "finetune.steps=3"]), ALONE
    )
    assert asked == {"", "kind 0", "kind 1", "kind 2"}

    with pytest.raises(BadData, match="its cached embeddings are of captions"):
        cached = [another_run(recipe, "cached-classes"), *data, "data.text=cached"]
        finetune(load_recipe(recipe, cached), ALONE)


def test_what_was_prepared_for_another_model_is_refused(recipe, tmp_path):
    vae = DiffusersFolder(recipe.parent / "run" / "lifted").fingerprint("vae")
    made = {"family": "flux2", "vae": vae, "text length": 12, "prompt": "caption"}
    read = samples_of(recipe)
    mispaired = [replace(s, latent=o.latent) for s, o in zip(read, read[::-1], strict=True)]
    shard = f"data.train={tmp_path}/000000.tar"
    for key, other in (
        ("family", "sd3"),
        ("vae", "sha256:0"),
        ("text encoders", "sha256:0"),
        ("text length", 77),
        ("prompt", "label"),
    ):
        write_shard(tmp_path / "000000.tar", read, made=made | {key: other})
        with pytest.raises(BadData, match=f"was prepared with {key} {other}"):
            finetune(load_recipe(recipe, [another_run(recipe, "other-model"), shard]), ALONE)

    # What says that this VAE made it is believed: nothing is encoded again.
    write_shard(tmp_path / "000000.tar", mispaired, made=made)
    name = another_run(recipe, "this-model")
    assert finetune(load_recipe(recipe, [name, shard, "finetune.steps=1"]), ALONE).step == 1


def test_a_file_asks_for_a_stop_and_the_run_goes_on(recipe, alone):
    name = another_run(recipe, "asked")
    ask = recipe.parent / "asked" / "save_quit"
    ask.touch()

    with pytest.raises(StoppedEarly, match="stopped by a save_quit file after step 1 of 8") as stop:
        finetune(load_recipe(recipe, [name, "finetune.zero.stage=2"]), ALONE)
    assert stop.value.exit == Exit.RESUMABLE
    assert not ask.exists()  # or the next run would stop at once
    report = finetune(load_recipe(recipe, [name, "finetune.zero.stage=2"]), ALONE)

    assert report.resumed_from == 1
    assert report.last["loss"] == alone["full-2"]["metrics"][-1]["loss"]


def test_what_ends_one_rank_ends_all_with_the_same_message(recipe, alone):
    """All checkpoints damaged, which rank 0 alone sees; then a shard that is gone."""
    name = another_run(recipe, "pair-damaged")
    folder = recipe.parent / "pair-damaged" / "checkpoints"
    shutil.copytree(recipe.parent / "full-0" / "checkpoints", folder)
    for manifest in folder.glob("*/manifest.json"):
        manifest.write_text("{}")

    for job, code, expected in (
        ([name], Exit.BAD_DATA, "all checkpoints in it are damaged"),
        ([another_run(recipe, "pair-gone"), "data.train=gone.tar"], Exit.BAD_DATA, "no such shard"),
    ):
        _, codes, said = drive(recipe, [job], ranks=2)
        assert codes == [code, code], said
        assert all(expected in text and "Traceback" not in text for text in said)


def test_latents_of_other_images_are_refused_before_training(recipe, tmp_path):
    read = samples_of(recipe)
    mixed = [replace(s, latent=o.latent) for s, o in zip(read, [*read[1:], read[0]], strict=True)]
    write_shard(tmp_path / "000000.tar", mixed)
    overrides = [another_run(recipe, "mispaired"), f"data.train={tmp_path}/000000.tar"]

    with pytest.raises(BadData, match="belong to other images, another VAE"):
        finetune(load_recipe(recipe, overrides), ALONE)


def test_bad_samples_are_counted_by_reason_and_named_once(recipe, tmp_path, capfd):
    """Over several epochs, and again when the run goes on; the report adds up all of them."""
    read = samples_of(recipe)
    read[3].text = {"encoder_hidden_states": torch.zeros(7, 3)}
    read[4].text = {"encoder_hidden_states": torch.zeros(7, 3)}
    read[5].latent = torch.zeros(3, 8, 8)
    shard = tmp_path / "000000.tar"
    write_shard(shard, read)
    shard.write_bytes(shard.read_bytes()[:-2048])  # the end of the archive, and of a sample
    run = [another_run(recipe, "bad-samples"), f"data.train={shard}", "data.max_bad_fraction=0.5"]

    finetune(load_recipe(recipe, [*run, "finetune.steps=5"]), ALONE)
    said = capfd.readouterr().err
    report = finetune(load_recipe(recipe, run), ALONE)

    assert report.resumed_from == 5
    assert report.bad_samples == {
        "text embedding does not fit": 2,
        "latent has the wrong number of channels": 1,
        "shard is cut off": 1,
    }
    assert said.count("text embedding does not fit") == 2
    assert said.count("left out, shard is cut off") == 1
    [log] = (recipe.parent / "bad-samples" / "logs").glob("skipped-*.jsonl")
    named = [json.loads(line)["sample"] for line in log.read_text().splitlines()]
    assert len(named) == len(set(named)) == 4
    assert finetune(load_recipe(recipe, run), ALONE).bad_samples == report.bad_samples
    shown = "\n".join(describe_finetune(report))
    assert "bad samples left out: text embedding does not fit 2, " in shown


def test_pictures_smaller_than_a_patch_are_named_and_counted(recipe, tmp_path):
    read = samples_of(recipe)
    read[0].image = read[0].image[:, :4, :4]
    write_shard(tmp_path / "000000.tar", read)
    overrides = [another_run(recipe, "small"), f"data.train={tmp_path}/000000.tar"]

    with pytest.raises(BadData, match=r"1 of 24 samples cannot be used \(smaller than one patch 1"):
        finetune(load_recipe(recipe, overrides), ALONE)


@pytest.mark.parametrize("stage", [0, 2])
def test_updates_that_are_not_finite_are_left_out_and_then_end_the_run(recipe, stage, capfd):
    overrides = [another_run(recipe, f"diverged-{stage}"), f"finetune.zero.stage={stage}"]
    overrides += ["finetune.optimizer.lr=1e30", "finetune.schedule.warmup=0"]

    with pytest.raises(BadData, match="5 updates in a row were not finite"):
        finetune(load_recipe(recipe, overrides), ALONE)

    assert capfd.readouterr().err.count("the update was left out") == 4


def test_restarts_do_not_keep_a_run_alive_that_has_no_finite_updates(recipe, capfd):
    """How many were left out in a row is saved: three before the restart, and two after it."""
    overrides = [another_run(recipe, "restarted"), "finetune.zero.stage=0"]
    overrides += ["finetune.optimizer.lr=1e30", "finetune.schedule.warmup=0"]
    name = recipe.parent / "restarted"

    finetune(load_recipe(recipe, [*overrides, "finetune.steps=4"]), ALONE)
    for _ in range(2):
        with pytest.raises(BadData, match=r"step 6: .*\n5 updates in a row were not finite"):
            finetune(load_recipe(recipe, overrides), ALONE)
    assert steps_on_disk(name / "checkpoints")[0] == 4

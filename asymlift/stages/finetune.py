"""finetune: lifted model + shards -> checkpoints, previews and metrics.

A step is a pure function of the weights and its number: data order, noise, noise level, dropped
captions and adapter dropout follow from (seed, step, slot). State is what a checkpoint holds.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asymlift.artifacts.checkpoint import (
    EMA,
    OPTIMIZER,
    TRAINABLE,
    Checkpoint,
    check_space,
    committing,
    newest_whole,
    open_checkpoint,
    prune,
    remove_leftovers,
    step_folder,
)
from asymlift.artifacts.files import exclusive_lock, write_bytes_atomically
from asymlift.artifacts.lifted_folder import Lifted, read_lifted
from asymlift.artifacts.manifest import digest_json
from asymlift.artifacts.safetensors_stream import SafetensorsWriter, TensorInfo, load_tensors
from asymlift.data.feed import Feed, StepSamples
from asymlift.data.order import EMPTY, Order, derive, share_of
from asymlift.data.shards import BadSample, Sample, SampleIndex, expand, index_shards
from asymlift.errors import BadData, BadRecipe, StoppedEarly
from asymlift.families import find_family
from asymlift.families.base import Family
from asymlift.maths.pace import karras_decay, learning_rate_factor
from asymlift.maths.schedule import draw_sigma, draw_sigma_mode, draw_sigma_uniform
from asymlift.model.batch import BatchMaker, Embedding, Place
from asymlift.model.ema import Ema
from asymlift.model.loading import load_pipeline, load_transformer
from asymlift.model.perceptual import Perceptual, load_lpips
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.trainable import Adapters, Trainable, train_everything, train_parts
from asymlift.model.training_step import LossConstants, TrainingStep
from asymlift.recipe import FinetuneSection, Recipe, TimeSection
from asymlift.report.training_report import training_page
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.engine import MOMENTS, Engine, EngineSettings
from asymlift.runtime.log import Metrics, detail, progress, read_metrics, say, warn
from asymlift.runtime.signals import StopRequest, stop_requests
from asymlift.stages.preview import Previews

MIN_SEEN = 1000  # before that many samples, the share of bad ones says little
MAX_SKIPPED = 5  # updates in a row without finite gradients


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did."""

    folder: Path
    step: int
    resumed_from: int
    checkpoint: Path
    seconds: float
    num_trained: int  # parameters
    last: dict[str, float]  # the last line of metrics.jsonl
    bad_samples: dict[str, int]


def finetune(
    recipe: Recipe, ranks: Ranks, *, zero3: dict[str, int] | None = None
) -> FinetuneReport:
    """Train to the recipe's last step, from the newest checkpoint that is whole."""
    settings = recipe.finetune
    folder = recipe.run_folder
    accumulation = accumulation_for(settings, ranks)
    device = dist.device_for(ranks)
    dist.join(ranks, device, settings.timeout)
    with locked(folder, ranks), stop_requests() as request:
        return Run(recipe, ranks, device, accumulation, zero3 or {}).to_the_end(request)


def accumulation_for(settings: FinetuneSection, ranks: Ranks) -> int:
    at_once = settings.micro_batch * ranks.world
    if settings.batch % at_once:
        raise BadRecipe(
            f"finetune.batch {settings.batch} is not a multiple of micro_batch "
            f"{settings.micro_batch} x {ranks.world} ranks; change one of the three"
        )
    return settings.batch // at_once


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """One finetune per run folder."""
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / ".finetune.lock", "this run"):
            yield
    else:
        yield


class Run:
    """One process's share of a run: what it holds, and what it does with every step."""

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        device: torch.device,
        accumulation: int,
        zero3: dict[str, int],
    ) -> None:
        self.recipe, self.settings, self.ranks, self.device = recipe, recipe.finetune, ranks, device
        self.folder, self.checkpoints = recipe.run_folder, recipe.run_folder / "checkpoints"
        self.accumulation = accumulation
        self.precision = torch.bfloat16 if self.settings.precision == "bfloat16" else None
        self.lifted = read_lifted(self.folder / "lifted")
        own = ":" in recipe.model.family
        self.family = find_family(recipe.model.family if own else self.lifted.family, {}, {})

        self.samples, self.grids = index_training_data(recipe, self.lifted)
        self.order = Order(self.grids, self.settings.batch, self.settings.seed)
        self.share = share_of(
            range(self.settings.batch), ranks.rank, ranks.world, self.settings.micro_batch
        )
        encoders = Encoders(self.lifted, self.family, recipe, device, self.samples)
        self.maker = encoders.batch_maker(self.settings)
        self.previews = Previews.begin(recipe, self.lifted, self.family, ranks, device, encoders)
        encoders.let_go()

        self.step_module, self.trainable = build_step(
            self.settings, self.lifted, self.family, self.precision, device
        )
        self.engine = Engine(self.step_module, self.trainable, self.engine_settings(zero3), ranks)
        self.ema = Ema(self.trainable.parameters) if self.settings.ema else None
        self.num_seen, self.num_bad, self.faults = 0, 0, Counter[str]()
        self.skipped_in_a_row = 0

    def engine_settings(self, zero3: dict[str, int]) -> EngineSettings:
        use = self.settings
        return EngineSettings(
            zero_stage=use.zero.stage,
            micro_batch=use.micro_batch,
            accumulation=self.accumulation,
            betas=use.optimizer.betas,
            eps=use.optimizer.eps,
            weight_decay=use.optimizer.weight_decay,
            autocast=self.precision if use.train == "full" else None,
            zero3=zero3 if use.zero.stage == 3 else {},
        )

    # --- the loop -----------------------------------------------------------------------------

    def to_the_end(self, request: StopRequest) -> FinetuneReport:
        started = time.monotonic()
        steps = self.settings.steps
        begin = self.resume()
        if self.ranks.first:
            self.announce(begin)
        metrics = Metrics(self.folder / "metrics.jsonl", begin) if self.ranks.first else None
        last: dict[str, float] = {}
        feed = Feed(
            self.samples,
            self.order,
            self.share,
            workers=self.recipe.data.workers,
            check=self.check_sample,
        )
        shown = progress("finetune", steps, begin) if self.ranks.first else nullcontext()
        with feed, shown as ticker:
            if self.previews and begin == 0:
                self.show(0)
            for step in range(begin, steps):
                if self.ranks.first:
                    request.look_for_file(self.folder)
                last, stop = self.one_step(step, feed, request)
                if metrics is not None:
                    metrics.write(step + 1, **last)
                if ticker is not None:
                    ticker.tick(note=f"loss {last['loss']:.4f}")
                done = step + 1
                if done % self.settings.checkpoint.every == 0 or done == steps or stop:
                    self.save(done)
                if self.previews and (done % self.previews.every == 0 or done == steps):
                    self.show(done)
                if stop and done < steps:
                    raise StoppedEarly(
                        f"stopped by {stop} after step {done} of {steps}, and saved; "
                        "run the same command again to go on",
                        request.exit,
                    )
        if metrics is not None:
            metrics.close()
            self.write_page()
        return FinetuneReport(
            folder=self.folder,
            step=steps,
            resumed_from=begin,
            checkpoint=step_folder(self.checkpoints, steps),
            seconds=time.monotonic() - started,
            num_trained=self.trainable.num_parameters,
            last=last,
            bad_samples=dict(self.faults),
        )

    def write_page(self) -> None:
        lines = read_metrics(self.folder / "metrics.jsonl")
        text = training_page(f"finetune {self.recipe.name}", lines, self.folder / "samples")
        write_bytes_atomically(self.folder / "finetune-report.html", text.encode())

    def one_step(
        self, step: int, feed: Feed, request: StopRequest
    ) -> tuple[dict[str, float], str | None]:
        """Train on one global batch; returns what is logged, and why to stop, if anybody asked."""
        started = time.monotonic()
        read = feed.step(step)
        waited = time.monotonic() - started
        num_good = sum(sample is not None for micro in read.micro_batches for sample in micro)
        counts = torch.tensor(
            [num_good, len(read.faults), float(request.reason is not None)],
            dtype=torch.float64,
            device=self.device,
        )
        num_good, num_bad, num_asking = (int(n) for n in dist.summed(counts).tolist())
        self.note_faults(read, num_good, num_bad)
        totals = self.gradients(step, read, num_good)
        settings, update = self.settings, self.engine.num_updates
        factor = learning_rate_factor(
            step,
            settings.steps,
            kind=settings.schedule.kind,
            warmup=settings.schedule.warmup,
            decay_from=settings.schedule.decay_from,
            floor=settings.schedule.floor,
        )
        rate = settings.optimizer.lr * factor
        clip = settings.clip
        norm = self.engine.update(
            {
                role: rate * settings.optimizer.lr_scale.get(role, 1.0)
                for role in set(self.trainable.roles.values())
            },
            clip.norm if clip and step >= clip.from_step else 0.0,
        )
        self.guard(step, totals["loss"], norm, read, applied=self.engine.num_updates > update)
        self.average(step + 1)
        logged = {
            **totals,
            "grad_norm": norm,
            "lr": rate,
            "epoch": step / self.order.steps_per_epoch,
            "samples": (step + 1) * settings.batch,
            "bad_samples": sum(self.faults.values()),
            "seconds": round(time.monotonic() - started, 4),
            "seconds_waiting_for_data": round(waited, 4),
        }
        reason = (request.reason or "another rank") if num_asking else None
        return logged, reason

    def gradients(self, step: int, read: StepSamples, num_good: int) -> dict[str, float]:
        """Forward and backward of every micro-batch; the means of what is logged."""
        settings, slots = self.settings, self.order.slots(step)
        epoch = self.order.epoch_of(step)
        grid = self.grids[next(i for i in slots if i != EMPTY)]
        # DeepSpeed averages over micro-batches and ranks; the loss is a mean over good samples.
        scale = self.accumulation * self.ranks.world / max(num_good, 1)
        sums: dict[str, Tensor] = {}
        for number, (positions, samples) in enumerate(
            zip(self.share, read.micro_batches, strict=True)
        ):
            place = Place(settings.seed, epoch, [step * settings.batch + i for i in positions])
            batch = self.maker.make(samples, place, grid)
            torch.manual_seed(derive(settings.seed, "dropout", step, number, self.ranks.rank))
            for name, value in self.engine.forward_backward(batch, scale).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
            if number < self.accumulation - 1:
                self.engine.micro_step_done()
        together = dist.summed(torch.stack([value.double() for value in sums.values()]))
        means = (together / max(num_good, 1)).tolist()
        return dict(zip(sums, means, strict=True))

    def show(self, step: int) -> None:
        """Pictures of the averaged weights, which sit in the model only while they are made."""
        assert self.previews is not None
        shards = self.ema.shards if self.ema else {}
        with self.engine.showing(shards):
            self.previews.show(step, self.step_module.student)

    def average(self, done: int) -> None:
        use = self.settings.ema
        if self.ema is None or use is None:
            return
        since = done - use.from_step
        self.ema.update(
            karras_decay(since, use.gamma)
            if use.kind == "karras"
            else (use.decay if since > 0 else 0.0)
        )

    # --- what can go wrong --------------------------------------------------------------------

    def check_sample(self, index: SampleIndex, sample: Sample) -> None:
        """Raise BadSample where a sample does not fit the model."""
        if sample.text is None and self.maker.encode_captions is None:
            raise BadSample(index.where, "no text embedding")
        if sample.latent is None:
            return
        geometry = self.lifted.geometry
        rows, columns = grid_of(index, geometry.pixel_patch)
        expected = (geometry.channels, rows * geometry.patch, columns * geometry.patch)
        if tuple(sample.latent.shape) != expected:
            raise BadSample(
                index.where,
                "latent has the wrong shape",
                f"{tuple(sample.latent.shape)}, the image needs {expected}",
            )

    def note_faults(self, read: StepSamples, num_good: int, num_bad: int) -> None:
        """Count, write down, and stop when too many samples are bad."""
        self.num_seen += num_good + num_bad
        self.faults.update(fault.reason for fault in read.faults)
        if read.faults:
            logs = self.folder / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            with (logs / f"skipped-{self.ranks.rank}.jsonl").open("a") as file:
                for fault in read.faults:
                    line = {"sample": fault.where, "reason": fault.reason, "detail": fault.detail}
                    file.write(json.dumps(line) + "\n")
        self.num_bad += num_bad
        allowed = self.recipe.data.max_bad_fraction * max(self.num_seen, MIN_SEEN)
        if self.num_bad > allowed:
            here = "; ".join(str(fault) for fault in read.faults[:3]) or "named by another rank"
            raise BadData(
                f"{self.num_bad} of {self.num_seen} samples are bad, more than "
                f"data.max_bad_fraction {self.recipe.data.max_bad_fraction:g} allows: {here}\n"
                f"all of them are listed in {self.folder / 'logs'}"
            )

    def guard(
        self, step: int, loss: float, norm: float, read: StepSamples, *, applied: bool
    ) -> None:
        """DeepSpeed leaves out updates that are not finite; a run of them ends the run."""
        finite = torch.isfinite(torch.tensor([loss, norm])).all()
        self.skipped_in_a_row = 0 if finite and applied else self.skipped_in_a_row + 1
        if not self.skipped_in_a_row:
            return
        keys = [s.key for micro in read.micro_batches for s in micro if s is not None]
        said = f"step {step + 1}: loss {loss}, gradient norm {norm}; samples {', '.join(keys[:8])}"
        if self.skipped_in_a_row >= MAX_SKIPPED or (self.engine.stage == 0 and not finite):
            raise BadData(
                f"{said}\nthe last whole checkpoint is from before; lower the learning rate, "
                "or look at these samples"
            )
        warn(f"{said}; the update was left out")

    # --- state --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What has to be equal, or known, to go on from a checkpoint."""
        adapters = adapters_of(self.settings, self.family)
        return {
            "lora": {"rank": adapters.rank, "alpha": adapters.alpha} if adapters else None,
            # A list: the order counts, and JSON objects are sorted when they are written.
            "parameters": [
                [name, list(self.engine.shape_of(name)), self.trainable.roles[name]]
                for name in self.trainable.parameters
            ],
            "fingerprints": {
                "lifted": digest_json(self.lifted.facts),
                "data": data_digest(self.samples, self.grids),
            },
            "recipe": json.loads(self.settings.model_dump_json()),
            "caption_dropout": self.recipe.data.caption_dropout,
        }

    def save(self, step: int) -> None:
        """Gather one tensor at a time; rank 0 writes; one rename makes it a checkpoint."""
        state = {
            **self.state(),
            "updates": self.engine.num_updates,
            "samples": step * self.settings.batch,
            "seen": self.num_seen,
            "bad": self.num_bad,
        }
        shapes = {name: self.engine.shape_of(name) for name in self.trainable.parameters}
        files = [(TRAINABLE, shapes, self.engine.weights)]
        if self.ema is not None:
            files.append((EMA, shapes, self.ema_weights))
        moments = {f"{key}/{name}": shape for name, shape in shapes.items() for key in MOMENTS}
        files.append((OPTIMIZER, moments, self.engine.moments))
        if not self.ranks.first:
            for _, _, tensors in files:
                for _ in tensors():
                    pass
            dist.barrier()
            return
        infos = [
            (name, {key: TensorInfo("F32", shape) for key, shape in wanted.items()}, tensors)
            for name, wanted, tensors in files
        ]
        check_space(self.checkpoints, sum(i.num_bytes for _, w, _ in infos for i in w.values()))
        with committing(self.checkpoints, step, state) as staged:
            for name, wanted, tensors in infos:
                with SafetensorsWriter(staged / name, wanted) as writer:
                    for key, tensor in tensors():
                        writer.write(key, tensor.detach().float().cpu().contiguous())
        keep = self.settings.checkpoint
        prune(self.checkpoints, keep.keep, keep.milestone)
        detail(f"saved {step_folder(self.checkpoints, step)}")
        dist.barrier()

    def ema_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The averaged weights, whole, one at a time; the raw ones where nothing is averaged."""
        if self.ema is None:
            yield from self.engine.weights()
            return
        for name, shard in self.ema.shards.items():
            yield name, self.engine.whole(name, shard)

    def resume(self) -> int:
        """Go on from the newest whole checkpoint; returns its step."""
        found: Checkpoint | None = None
        if self.ranks.first:
            for name in remove_leftovers(self.checkpoints):
                warn(f"removed {name}, which a killed run left behind")
            found = newest_whole(self.checkpoints, warn)
        folder = dist.from_first(self.ranks, str(found.folder) if found else "")
        if not folder:
            return 0
        checkpoint = found or open_checkpoint(Path(folder))
        changed = compare_states(checkpoint, self.state())
        if self.ranks.first:
            for line in changed:
                say(f"  changed since the checkpoint: {line}")
        if checkpoint.step >= self.settings.steps:
            self.restore_weights(checkpoint)
            return checkpoint.step
        self.rehearse(checkpoint.step)
        self.restore_weights(checkpoint)
        self.engine.set_moments(
            load_tensors(checkpoint.folder / OPTIMIZER), checkpoint.state["updates"]
        )
        self.num_seen, self.num_bad = checkpoint.state["seen"], checkpoint.state["bad"]
        return checkpoint.step

    def restore_weights(self, checkpoint: Checkpoint) -> None:
        self.engine.set_weights(load_tensors(checkpoint.folder / TRAINABLE))
        if self.ema is not None and (checkpoint.folder / EMA).exists():
            for name, whole in load_tensors(checkpoint.folder / EMA).items():
                self.ema.shards[name].copy_(self.engine.shard(name, whole))

    def rehearse(self, step: int) -> None:
        """One update that is thrown away: AdamW's state exists only after its first."""
        empty = StepSamples([[None] * len(positions) for positions in self.share])
        self.gradients(step, empty, 0)
        self.engine.update(dict.fromkeys(set(self.trainable.roles.values()), 0.0), 0.0)

    def announce(self, begin: int) -> None:
        settings = self.settings
        epochs = settings.steps / self.order.steps_per_epoch
        say(
            f"finetune {self.recipe.name}: {self.trainable.num_parameters:,} parameters train, "
            f"{len(self.samples):,} samples, {settings.steps} steps of {settings.batch} "
            f"({epochs:.1f} epochs), {self.ranks.world} rank(s) x {settings.micro_batch} x "
            f"{self.accumulation}, ZeRO {settings.zero.stage}, {settings.precision}"
        )
        if begin:
            say(f"resumed after step {begin}")


# --- what a run is made of ----------------------------------------------------------------------


def grid_of(index: SampleIndex, patch: int) -> tuple[int, int]:
    """Token rows and columns of a sample."""
    return index.height // patch, index.width // patch


def index_training_data(
    recipe: Recipe, lifted: Lifted
) -> tuple[list[SampleIndex], list[tuple[int, int]]]:
    patch = lifted.geometry.pixel_patch
    shards = index_shards(expand(recipe.data.train), on_bad=lambda fault: warn(str(fault)))
    found = [sample for shard in shards for sample in shard.samples]
    samples = [sample for sample in found if min(grid_of(sample, patch)) > 0]
    if not samples:
        raise BadData(
            f"{recipe.data.train}: no usable samples; an image needs at least {patch} x {patch} "
            "pixels"
        )
    return samples, [grid_of(sample, patch) for sample in samples]


def data_digest(samples: Sequence[SampleIndex], grids: Sequence[tuple[int, int]]) -> str:
    """Which samples, in which order, of which size: all that the order of training depends on."""
    digest = hashlib.sha256()
    for sample, grid in zip(samples, grids, strict=True):
        digest.update(f"{sample.key} {grid}\n".encode())
    return f"sha256:{digest.hexdigest()}"


class Encoders:
    """The folder's text encoder and VAE: for what is not cached, the empty prompt, previews."""

    def __init__(
        self,
        lifted: Lifted,
        family: Family,
        recipe: Recipe,
        device: torch.device,
        samples: Sequence[SampleIndex],
    ) -> None:
        self.lifted, self.family, self.recipe, self.device = lifted, family, recipe, device
        self.pipeline = load_pipeline(lifted.folder)
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(device)
        self.text_online = recipe.data.text == "online"
        self.latents_online = any(".latent.safetensors" not in s.members for s in samples)
        self.null_text = self.captions([""])[0]

    @torch.no_grad()
    def captions(self, prompts: list[str]) -> list[Embedding]:
        if not prompts:
            return []
        return self.family.encode_prompt(self.pipeline, prompts, self.recipe.model.text_length)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        return self.family.encode_latents(self.pipeline.vae, images)

    def batch_maker(self, settings: FinetuneSection) -> BatchMaker:
        return BatchMaker(
            self.family,
            self.lifted.geometry,
            self.lifted.color,
            self.device,
            null_text=self.null_text,
            caption_dropout=self.recipe.data.caption_dropout,
            draw_sigma=sigma_drawer(settings.time, self.device),
            encode_latents=self.latents if self.latents_online else None,
            encode_captions=self.captions if self.text_online else None,
        )

    def let_go(self) -> None:
        """Keep only what training itself needs."""
        if not self.text_online and not self.latents_online:
            self.pipeline = None


def sigma_drawer(use: TimeSection, device: torch.device) -> Callable[[torch.Generator], Tensor]:
    def draw(generator: torch.Generator) -> Tensor:
        if use.kind == "logit_normal":
            normal = torch.randn((), generator=generator, device=device)
            return draw_sigma(normal, shift=use.shift, mean=use.mean, std=use.std)
        uniform = torch.rand((), generator=generator, device=device)
        if use.kind == "uniform":
            return draw_sigma_uniform(uniform, shift=use.shift)
        return draw_sigma_mode(uniform, shift=use.shift, scale=use.mode_scale)

    return draw


def adapters_of(settings: FinetuneSection, family: Family) -> Adapters | None:
    if settings.train == "full" or settings.train.lora is None:
        return None
    lora = settings.train.lora
    targets = family.lora_targets if lora.targets == "family" else tuple(lora.targets)
    return Adapters(lora.rank, lora.alpha, lora.dropout, targets)


def build_step(
    settings: FinetuneSection,
    lifted: Lifted,
    family: Family,
    precision: torch.dtype | None,
    device: torch.device,
) -> tuple[TrainingStep, Trainable]:
    """The lifted model, made trainable, with its reference and its losses."""

    def load() -> PixelFlow:
        net = load_transformer(
            lifted.folder, family, dtype="stored" if precision else torch.float32
        )
        return PixelFlow(net, family, lifted.geometry, lifted.A, lifted.s, precision)

    reduces = settings.loss.kind == "variance_reduced"
    student = load()
    if settings.train == "full":
        trainable = train_everything(student.net)
    else:
        trainable = train_parts(
            student.net,
            family,
            adapters=adapters_of(settings, family),
            modules=settings.train.modules,
            keep_originals=reduces,
            seed=derive(settings.seed, "lora"),
        )
    reference = None
    if settings.loss.reference == "copy":
        reference = load().requires_grad_(False).eval()
    if settings.gradient_checkpointing:
        student.net.enable_gradient_checkpointing()
    step = TrainingStep(
        student,
        reference,
        loss_constants(settings, reduces),
        to_picture=lifted.color.decode,
        perceptual=load_perceptual(settings, device),
    )
    return step.to(device), trainable


def loss_constants(settings: FinetuneSection, reduces_variance: bool) -> LossConstants:
    loss = settings.loss
    return LossConstants(
        shift=loss.shift,
        weight=loss.weight,
        sigma_clamp=loss.sigma_clamp,
        control_floor=loss.control_floor,
        student_floor=loss.student_floor,
        reference_floor=loss.reference_floor,
        perceptual_weight=loss.perceptual.weight if loss.perceptual else 0.0,
        reduces_variance=reduces_variance,
    )


def load_perceptual(settings: FinetuneSection, device: torch.device) -> Perceptual | None:
    use = settings.loss.perceptual
    if use is None:
        return None
    if use.net == "embedded":
        from asymlift.embedded import PERCEPTUAL_NET
        from asymlift.embedded.nets import FeatureNet, perceptual_map

        return partial(perceptual_map, FeatureNet.load(PERCEPTUAL_NET).to(device))
    return load_lpips(use.net, use.weights, seed=derive(settings.seed, "lpips")).to(device)


FREE_TO_CHANGE = {"steps", "micro_batch", "zero", "checkpoint", "preview", "timeout"}
REFUSED_TO_CHANGE = {"seed", "batch", "train"}


def compare_states(checkpoint: Checkpoint, now: dict[str, Any]) -> list[str]:
    """Refuse a checkpoint of another run; list what changed and may."""
    then = checkpoint.state
    for part, what in (("lifted", "lifted model"), ("data", "training data")):
        if then["fingerprints"][part] != now["fingerprints"][part]:
            raise BadData(
                f"{checkpoint.folder}: made with another {what} "
                f"({then['fingerprints'][part][:19]}..., here {now['fingerprints'][part][:19]}...); "
                "use another `name`, or move the checkpoints away"
            )
    changed = [
        (key, then["recipe"].get(key), value)
        for key, value in now["recipe"].items()
        if then["recipe"].get(key) != value
    ]
    for key, old, new in changed:
        if key in REFUSED_TO_CHANGE:
            raise BadData(
                f"{checkpoint.folder}: made with finetune.{key} {json.dumps(old)}, the recipe says "
                f"{json.dumps(new)}; that cannot change in a run: use another `name`"
            )
    if then["parameters"] != now["parameters"]:
        pairs = zip_longest(then["parameters"], now["parameters"])
        old, new = next((old, new) for old, new in pairs if old != new)
        raise BadData(
            f"{checkpoint.folder}: other parameters were trained, or in another order: "
            f"{old} there, {new} here"
        )
    return [
        f"{key} {json.dumps(old)} -> {json.dumps(new)}"
        for key, old, new in changed
        if key not in FREE_TO_CHANGE or key == "steps"
    ]

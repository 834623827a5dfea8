"""What a finetune trains: the lifted model, its reference and its losses."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from asymlift.artifacts.lifted_folder import Lifted
from asymlift.data.order import derive
from asymlift.families.base import Family
from asymlift.model.checkpointing import checkpoint_blocks
from asymlift.model.compiling import compile_blocks
from asymlift.model.loading import load_transformer
from asymlift.model.perceptual import Perceptual, load_lpips
from asymlift.model.pixel_flow import PixelFlow
from asymlift.model.trainable import Adapters, train_everything, train_parts
from asymlift.model.training_step import LossConstants, TrainingStep
from asymlift.recipe import FinetuneSection
from asymlift.runtime.parameters import Trainable


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
        # It goes to the device as it is stored, mapped from files that the ranks of a node share:
        # in float32 it would lie on the host once for each of them.
        net = load_transformer(lifted.folder, family).to(device)
        if precision is None:
            net.float()
        return PixelFlow(net, family, lifted.geometry, lifted.A, lifted.s, precision)

    perceptual = load_perceptual(settings, device)
    step, trainable = assemble_step(settings, family, load, lifted.color.decode, perceptual)
    if settings.compile:
        for flow in (step.student, step.reference_copy):
            if flow is not None:
                compile_blocks(flow.net, device)
    return step.to(device), trainable


def assemble_step(
    settings: FinetuneSection,
    family: Family,
    load: Callable[[], PixelFlow],
    to_picture: Callable[[Tensor], Tensor],
    perceptual: Perceptual | None,
) -> tuple[TrainingStep, Trainable]:
    """What `load` returns, made trainable as the recipe says, wherever its weights are."""
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
        checkpoint_blocks(student.net)
    constants = loss_constants(settings, reduces)
    return TrainingStep(student, reference, constants, to_picture, perceptual), trainable


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
        skip_below=loss.skip_below,
        same_passes=settings.zero.stage == 3,
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

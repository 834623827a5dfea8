"""Make the embedded models again: `python -m asymlift.embedded.build OUT_DIR --variant weak`.

scenes -> feature nets -> VAE -> latent statistics -> transformer -> pipeline folder -> build.json

Parts that OUT_DIR already holds are kept, so an interrupted build continues; delete a part to have
it made again. The same seed gives the same scenes anywhere, and the same weights on the same
machine with the same number of threads.

Shapes: B batch, N tokens of a picture, d the latent token's width, S the side in pixels.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from asymlift.embedded import IMAGE_SIZE, PIXEL_MEAN, PIXEL_STD, TEXT_LENGTH
from asymlift.embedded.metrics import Measure, high_frequency_ratio
from asymlift.embedded.nets import FeatureNet
from asymlift.embedded.scenes import LABELS, caption, make_scenes
from asymlift.maths import basis
from asymlift.maths.moments import Moments
from asymlift.maths.patches import image_to_tokens
from asymlift.runtime import third_party

third_party.prepare()  # without it, diffusers does not import beside a CPU-only torch

from diffusers import (  # noqa: E402
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ModelMixin,
)

from asymlift.embedded.text import HIDDEN, make_text_encoder, make_tokenizer  # noqa: E402

VAE_CHANNELS = (16, 32, 64)  # three levels: one latent pixel for 4 x 4 pixels
LATENT_CHANNELS = 4
CELL = 4  # pixels per side under one latent pixel
PATCH = 2 * CELL  # pixels per token side: the packing doubles it
HEADS, HEAD_DIM = 4, 32
PULL_STEPS = 200  # of the VAE, over which the pull to a linear code fades out
EMPTY_SHARE = 0.1  # captions dropped, so that guidance has an unconditional model

# Seeds of scenes that no two purposes share.
TRAIN, HELD_OUT, REFERENCE = 0, 99, 555
CORPUS = range(0, 16384, 2048)  # first indices of the pieces the transformer's scenes come in


@dataclass(frozen=True)
class Variant:
    """What differs between the two embedded models."""

    folder: str
    vae_steps: int
    base_rounds: tuple[int, ...] = (3000, 1200)  # steps; a round starts from the last one's average


VARIANTS = {
    "weak": Variant("tiny", vae_steps=600),
    "good": Variant("tiny-good-vae", vae_steps=2200),
}


@dataclass(frozen=True)
class FeaturePlan:
    """A feature net: its width, its seed and the scenes it learns from."""

    widths: tuple[int, ...]
    seed: int
    scenes: int
    steps: int = 2600


FEATURE_NETS = {
    "perceptual": FeaturePlan((16, 32, 64, 64), seed=11, scenes=7),
    "metrics": FeaturePlan((16, 32, 64, 96), seed=22, scenes=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that receives the models")
    parser.add_argument("--variant", choices=[*VARIANTS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a try")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in VARIANTS if args.variant == "all" else [args.variant]:
        build(args.out, VARIANTS[name], seed=args.seed, scale=args.scale)


def build(out: Path, variant: Variant, *, seed: int, scale: float) -> None:
    """Make one pipeline folder, and the feature nets where they are missing."""
    folder = out / variant.folder
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "build.json"
    seconds = json.loads(record.read_text())["cpu_seconds"] if record.exists() else {}

    def make(name: str, path: Path, train: Callable[[], None]) -> Path:
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            began = time.process_time()
            train()
            seconds[name] = round(time.process_time() - began)
        return path

    def steps(full: int) -> int:
        return max(1, round(full * scale))

    nets = {}
    for name, plan in FEATURE_NETS.items():
        path = out / "feature_nets" / f"{name}.safetensors"
        make(name, path, partial(make_feature_net, plan, steps(plan.steps), path))
        nets[name] = FeatureNet.load(path)

    path = folder / "vae"
    make("vae", path, lambda: save_small(train_vae(steps(variant.vae_steps), seed=seed), path))
    vae = AutoencoderKLFlux2.from_pretrained(path).eval().requires_grad_(False)

    tokenizer = make_tokenizer()
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=make_text_encoder(len(tokenizer), seed=seed + 1),
        tokenizer=tokenizer,
        transformer=None,
    )

    def train_transformer() -> None:
        net = make_transformer(seed=seed + 2)
        for full in variant.base_rounds:
            train_base(net, pipeline, steps(full))
        save_small(net, folder / "transformer")

    path = make("transformer", folder / "transformer", train_transformer)
    transformer = Flux2Transformer2DModel.from_pretrained(path).eval()
    pipeline.register_modules(transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    save_rest(pipeline, folder)

    summary = asdict(variant) | {"seed": seed, "scale": scale, "image_size": IMAGE_SIZE}
    summary |= measure(pipeline, nets["metrics"]) | {"cpu_seconds": seconds}
    text = json.dumps(summary, indent=2)
    record.write_text(text + "\n")
    print(f"wrote {folder}\n{text}")


# --- feature nets ---------------------------------------------------------------------------------


def make_feature_net(plan: FeaturePlan, steps: int, path: Path) -> None:
    train_feature_net(plan, steps).save(path)


def train_feature_net(plan: FeaturePlan, steps: int, *, batch: int = 48) -> FeatureNet:
    """Learn the five labels from scenes, a third of them noisy and a sixth blurred."""
    torch.manual_seed(plan.seed)
    scenes = make_scenes(range(8192), seed=plan.scenes, size=IMAGE_SIZE)
    net = FeatureNet(plan.widths)

    def loss_at(step: int) -> Tensor:
        i = torch.randint(0, len(scenes), (batch,))
        image = scenes.image[i]
        if step % 3 == 0:
            image = image + 0.15 * torch.rand(batch, 1, 1, 1) * torch.randn_like(image)
        if step % 3 == 1:
            blurred = functional.avg_pool2d(image, 3, 1, 1)
            image = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, blurred, image)
        answers = net(image * 2 - 1)
        return sum(
            (
                functional.cross_entropy(answers[k], scenes.labels[i, j])
                for j, k in enumerate(LABELS)
            ),
            start=torch.zeros(()),
        )

    optimise(
        "feature net", net, loss_at, steps=steps, lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01
    )
    return net


# --- VAE ------------------------------------------------------------------------------------------


def train_vae(steps: int, *, seed: int, batch: int = 16) -> AutoencoderKLFlux2:
    """Train the VAE and measure its latent statistics, which FLUX.2 keeps in a batch norm.

    Left alone, a VAE this small settles on a code that a linear basis may or may not fit (R2 from
    0.26 to 0.70). So the mean of the latents is first pulled to a linear code of the picture; the
    pull ends, and R2 falls as details come in: 0.91 after 600 steps, 0.80 after 2200.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,  # 1 group trains visibly worse at this width
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        patch_size=(2, 2),
    ).to(memory_format=torch.channels_last)
    # Start with little noise on the latents, or the first steps learn to ignore them.
    vae.quant_conv.weight.data[LATENT_CHANNELS:] *= 0.1
    vae.quant_conv.bias.data[LATENT_CHANNELS:] = -5.0
    images = make_scenes(range(8192), seed=TRAIN, size=IMAGE_SIZE).image
    filters = linear_code(images[:2048])

    def loss_at(step: int) -> Tensor:
        image = images[torch.randint(0, len(images), (batch,))] * 2 - 1
        posterior = vae.encode(image.to(memory_format=torch.channels_last)).latent_dist
        error = vae.decode(posterior.sample()).sample - image
        kl = posterior.kl().mean() / image[0].numel()
        code = functional.conv2d(normalise(image / 2 + 0.5), filters, stride=CELL)
        pull = max(0.0, 1 - step / PULL_STEPS) * (posterior.mean - code).square().mean()
        loss: Tensor = error.square().mean() + 0.2 * error.abs().mean() + 0.01 * kl + pull
        return loss

    optimise("vae", vae, loss_at, steps=steps, lr=2.5e-3, betas=(0.9, 0.99), warmup=50, flat=0.0)
    vae.eval().requires_grad_(False)
    packed = pack(encode(vae, images[:4096])).flatten(0, 1)
    vae.bn.running_mean.copy_(packed.mean(0))
    vae.bn.running_var.copy_(packed.var(0))
    return vae.to(memory_format=torch.contiguous_format)


def linear_code(image: Tensor) -> Tensor:
    """Return filters (C, 3, CELL, CELL) that make a linear code of mean square 1 from images.

    They span the leading principal directions of the pixels under one latent pixel, turned so that
    every channel has the same variance: normalising the latents is then one scale, as a port has.
    """
    x = image_to_tokens(normalise(image), CELL)
    directions, eigenvalues = basis.pca(
        Moments.zero(x.shape[-1], 0).add(x, x[..., :0], len(image)), LATENT_CHANNELS
    )
    mean_square = eigenvalues[:LATENT_CHANNELS].mean() / x.shape[:-1].numel()
    hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    filters = hadamard.double() @ directions.T / mean_square.sqrt()
    return filters.float().view(LATENT_CHANNELS, 3, CELL, CELL)


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, image: Tensor) -> Tensor:
    """Return latent maps (n, C, S/4, S/4) of images in [0, 1], before any normalisation."""
    parts = torch.split(image * 2 - 1, 128)
    return torch.cat([vae.encode(part).latent_dist.mode() for part in parts])


def pack(latent: Tensor) -> Tensor:
    """Return latent tokens (n, N, d) from a map, in the order of the pipeline."""
    patches = Flux2KleinPipeline._patchify_latents(latent.contiguous())
    tokens: Tensor = Flux2KleinPipeline._pack_latents(patches)
    return tokens


def encode_tokens(vae: AutoencoderKLFlux2, image: Tensor) -> Tensor:
    """Return the tokens z0 that the transformer sees, (n, N, d), normalised."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    tokens: Tensor = (pack(encode(vae, image)) - vae.bn.running_mean) / std
    return tokens


# --- transformer ----------------------------------------------------------------------------------


def make_transformer(*, seed: int) -> Flux2Transformer2DModel:
    torch.manual_seed(seed)
    width = 4 * LATENT_CHANNELS
    return Flux2Transformer2DModel(
        in_channels=width,
        out_channels=width,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=3 * HIDDEN,
        timestep_guidance_channels=128,
        axes_dims_rope=(HEAD_DIM // 4,) * 4,
        guidance_embeds=False,
    )


def train_base(
    net: Flux2Transformer2DModel, pipeline: Flux2KleinPipeline, steps: int, *, batch: int = 48
) -> None:
    """Train the latent flow model on what the pipeline's own encode_prompt says."""
    scenes = (make_scenes(range(i, i + 2048), seed=TRAIN, size=IMAGE_SIZE) for i in CORPUS)
    parts = [(encode_tokens(pipeline.vae, part.image), part.labels) for part in scenes]
    tokens, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    table, rows, text_ids = text_table(pipeline, labels)
    side = IMAGE_SIZE // PATCH
    image_ids = pipeline._prepare_latent_ids(torch.zeros(1, 1, side, side))[0]

    def loss_at(step: int) -> Tensor:
        i = torch.randint(0, len(tokens), (batch,))
        row = torch.where(torch.rand(batch) < EMPTY_SHARE, len(table) - 1, rows[i])
        z0, noise = tokens[i], torch.randn_like(tokens[i])
        tau = torch.randn(batch).sigmoid()  # logit-normal, no shift
        level = tau[:, None, None]
        v = net(
            hidden_states=(1 - level) * z0 + level * noise,
            encoder_hidden_states=table[row],
            timestep=tau,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        loss: Tensor = (v - (noise - z0)).square().mean()
        return loss

    optimise(
        "base", net, loss_at, steps=steps, lr=1.5e-3, betas=(0.9, 0.98), warmup=100, average=0.998
    )


@torch.no_grad()
def text_table(pipeline: Flux2KleinPipeline, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings of the captions and, last, the empty one; each sample's row; text ids."""
    distinct, rows = torch.unique(labels, dim=0, return_inverse=True)
    prompts = [caption(row) for row in distinct] + [""]
    parts = [
        pipeline.encode_prompt(prompts[i : i + 256], "cpu", max_sequence_length=TEXT_LENGTH)[0]
        for i in range(0, len(prompts), 256)
    ]
    table = torch.cat(parts)
    return table, rows, pipeline._prepare_text_ids(table[:1])[0]


# --- shared ---------------------------------------------------------------------------------------


def optimise(
    name: str,
    net: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    warmup: int = 20,
    flat: float = 0.5,
    average: float | None = None,
) -> None:
    """Run AdamW: warm up, stay flat for a share of the steps, fall to zero; end on the average."""
    net.train()
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr, betas=betas, weight_decay=weight_decay, fused=True
    )
    mean = [p.detach().clone() for p in parameters]
    began, losses = time.process_time(), 0.0
    for step in range(steps):
        fall = (1 - step / steps) / (1 - flat)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / warmup, max(0.02, fall))
        loss = loss_at(step)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if average:
            keep = min(average, (2 + step) / (11 + step))
            torch._foreach_lerp_(mean, [p.detach() for p in parameters], 1 - keep)
        losses += loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            count = (step + 1) % 200 or 200
            cpu = time.process_time() - began
            print(
                f"{name}: step {step + 1}/{steps}, loss {losses / count:.4f}, {cpu:.0f} CPU s",
                flush=True,
            )
            losses = 0.0
    if average:
        for p, value in zip(parameters, mean, strict=True):
            p.data.copy_(value)


def save_small(model: ModelMixin, path: Path) -> None:
    """Save in bfloat16, as FLUX.2 is; what follows is trained on the weights read back."""
    unfinished = path.with_name(f"{path.name}.part")
    model.to(torch.bfloat16).save_pretrained(unfinished)
    unfinished.rename(path)  # a part is there whole or not at all


def save_rest(pipeline: Flux2KleinPipeline, folder: Path) -> None:
    """Save what is not a trained model, with the chat template inside the tokenizer's JSON."""
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer", save_jinja_files=False)
    pipeline.save_config(folder)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # some writers leave their files private


# --- what was measured ----------------------------------------------------------------------------


@torch.no_grad()
def measure(pipeline: Flux2KleinPipeline, judge: FeatureNet) -> dict[str, object]:
    """Measure VAE, alignment and base on scenes that nothing was trained on."""
    vae = pipeline.vae
    held_out = make_scenes(range(512), seed=HELD_OUT, size=IMAGE_SIZE)
    reference = make_scenes(range(2048), seed=REFERENCE, size=IMAGE_SIZE).image
    score = Measure(judge, reference)
    some, labels = held_out.image[:256], held_out.labels[:256]
    decoded = [vae.decode(part).sample for part in torch.split(encode(vae, some), 64)]
    reconstruction = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
    error = (reconstruction - some).square().mean((1, 2, 3))
    torch.manual_seed(77)
    sampled = pipeline(
        prompt=[caption(row) for row in labels],
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=16,
        guidance_scale=1.0,
        max_sequence_length=TEXT_LENGTH,
        output_type="pt",
    ).images
    train = make_scenes(range(1024), seed=TRAIN, size=IMAGE_SIZE).image
    return {
        "vae_psnr": round(float((-10 * error.log10()).mean()), 2),
        "vae_high_frequency": round(high_frequency_ratio(reconstruction, some), 3),
        "alignment": rounded(alignment(vae, train, held_out.image)),
        "real": rounded(asdict(score(some, labels))),
        "vae_reconstruction": rounded(asdict(score(reconstruction, labels))),
        "latent_base": rounded(asdict(score(sampled, labels))),
    }


def alignment(vae: AutoencoderKLFlux2, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """Fit a Procrustes basis on one set and report, on the other, how well a port would start."""
    fitted_on = moments(vae, train)
    A, _ = basis.procrustes(fitted_on)
    s = basis.norm_matched_scale(A, fitted_on)
    return {"scale": s} | asdict(basis.alignment(A, s, moments(vae, held_out)))


def moments(vae: AutoencoderKLFlux2, image: Tensor) -> Moments:
    """Return the moments of aligned latent and pixel tokens of these images."""
    x = image_to_tokens(normalise(image), PATCH)
    z = encode_tokens(vae, image)
    zero = Moments.zero(x.shape[-1], z.shape[-1])
    return zero.add(x, z, len(image))


def normalise(image: Tensor) -> Tensor:
    """Return the pixels, given in [0, 1], that a basis is fitted on."""
    return (image - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / PIXEL_STD


def rounded(value: object) -> object:
    """Return the same structure with floats a person can read."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()

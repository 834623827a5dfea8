"""What fit-basis found, as numbers and as a page.

D pixel token width, d latent token width, p pixel patch.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from asymlift.maths.asymmetric import project
from asymlift.maths.basis import Alignment
from asymlift.maths.color import ColorCode
from asymlift.maths.flow import low_rank_image
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.report.charts import line_chart
from asymlift.report.html import drawing, numbers, page, paragraph, picture, table
from asymlift.report.pictures import grid_png

Verdict = Literal["good", "marginal", "poor"]

COLUMNS_PER_ROW = 16
PICTURE_SIDE = 256  # pixels of a held-out image on the page
MOST_NAMED = 50  # samples listed by name on the page
SHOWN_SIDE = 48  # pixels of a basis column on the page, about

VERDICTS: dict[Verdict, str] = {
    "good": "Good. Inside the subspace the latents say what the pixels say, so the converted model "
    "starts from recognisable pictures.",
    "marginal": "Marginal. The latents carry some of the pixels; the converted model starts from "
    "coarse pictures, and finetuning has much to make up for.",
    "poor": "Poor. The latents say less about the pixels than nothing at all would, so the "
    "converted model would start from noise. Latents that keep no low-level detail "
    "(representation autoencoders) cannot be lifted; otherwise look for latents that belong to "
    "other images, or are not normalised as the base expects.",
}


@dataclass(frozen=True)
class Comparison:
    """Another choice on the same held-out images."""

    name: str
    s: float
    score: Alignment


@dataclass(frozen=True)
class BasisReport:
    """Everything fit-basis can say; `score` and the comparisons are on held-out images."""

    path: Path  # basis.safetensors, unless the fit was refused
    page: Path  # basis-report.html
    verdict: Verdict
    method: str
    family: str
    patch: int
    rank: int  # d
    s: float
    color: ColorCode
    color_fitted: bool
    score: Alignment
    num_images: int
    num_tokens: int
    num_judges: int
    judges: str  # where the held-out images come from
    comparisons: list[Comparison]
    convergence: list[tuple[int, float, float]]  # images, R2, captured
    spectrum: list[float]  # singular values of the cross moments
    column_energy: list[float]  # share of held-out pixel energy, by column of A
    pca_energy: list[float]  # the same, of the d best directions there are
    num_encoded: int  # latents made here, for want of cached ones
    disagreement: float | None  # of cached latents with the VAE's; None: not checked
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> count
    skipped_samples: list[str] = field(default_factory=list)
    already_done: bool = False

    @property
    def r2(self) -> float:
        return self.score.r2

    def facts(self) -> dict[str, Any]:
        """As JSON has it, without the paths."""
        facts = asdict(self)
        for name in ("path", "page", "already_done"):
            del facts[name]
        return facts

    @classmethod
    def from_facts(cls, facts: dict[str, Any], path: Path, page: Path) -> "BasisReport":
        values = dict(facts)
        color = values["color"]
        values["color"] = ColorCode(color["space"], tuple(color["mean"]), color["std"])
        values["score"] = Alignment(**values["score"])
        values["comparisons"] = [
            Comparison(item["name"], item["s"], Alignment(**item["score"]))
            for item in values["comparisons"]
        ]
        values["convergence"] = [tuple(point) for point in values["convergence"]]
        return cls(path, page, **values, already_done=True)


@dataclass(frozen=True)
class HeldOutPictures:
    """One image in several renderings, all (3, H, W) in [-1, 1]; None without a VAE."""

    original: Tensor
    autoencoder: Tensor | None
    projected: Tensor
    from_latent: Tensor


def renderings(
    image: Tensor,
    latent: Tensor,
    decoded: Tensor | None,
    report: BasisReport,
    A: Tensor,
    latent_patch: int,
) -> HeldOutPictures:
    """The middle of an image (3, H, W) uint8, and what its latent (C, h, w) shows of it."""
    patch, color = report.patch, report.color
    original = image.float() / 127.5 - 1
    grid = (image.shape[1] // patch, image.shape[2] // patch)
    x = image_to_tokens(color.encode(original[None]), patch)
    z = image_to_tokens(latent[None].float(), latent_patch)
    projected, from_latent = (
        color.decode(tokens_to_image(tokens, patch, grid))[0].clamp(-1, 1)
        for tokens in (project(x, A), low_rank_image(z, A, report.s))
    )
    return HeldOutPictures(
        middle(original, patch),
        None if decoded is None else middle(decoded, patch),
        middle(projected, patch),
        middle(from_latent, patch),
    )


def middle(image: Tensor, patch: int) -> Tensor:
    """A square cut out of the middle on patch borders, small enough for a page."""
    side = min(*image.shape[1:], max(PICTURE_SIDE, patch)) // patch * patch
    top, left = ((full - side) // 2 // patch * patch for full in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def basis_page(report: BasisReport, A: Tensor, examples: list[HeldOutPictures]) -> str:
    """The HTML of basis-report.html."""
    return page(
        f"Basis for {report.family}: {report.verdict}",
        [
            ("", summary(report)),
            ("Held-out images", held_out(examples)),
            ("Other choices, same images", comparisons(report)),
            ("Were there enough images?", convergence(report)),
            ("The directions", directions(report, A)),
            ("How it was made", origin(report)),
        ],
    )


def summary(report: BasisReport) -> str:
    score = report.score
    return paragraph(VERDICTS[report.verdict], report.verdict) + numbers(
        [
            (
                f"{score.r2:.3f}",
                "R2: the latents agree with the pixels",
                "1 is perfect, 0 no better than a grey picture, below 0 worse than that. Good from "
                "0.5, refused below 0 (provisional limits).",
            ),
            (
                f"{score.captured:.3f}",
                "captured: the subspace sees this much",
                f"Share of pixel energy inside the {report.rank} of {3 * report.patch**2} "
                "directions. High alone means little.",
            ),
            (
                f"{score.explained:.3f}",
                "explained: what the model starts from",
                "The product of the two: share of pixel energy that the latent, seen through the "
                "basis, already shows.",
            ),
        ]
    )


def held_out(examples: list[HeldOutPictures]) -> str:
    if not examples:
        return paragraph("No picture to show.")
    side = min(min(example.original.shape[1:]) for example in examples)
    rows = [("original", [example.original for example in examples])]
    if examples[0].autoencoder is not None:
        made = [e.autoencoder for e in examples if e.autoencoder is not None]
        rows.append(("the VAE", made))
    rows.append(("pixels through\nthe subspace\nA A^T x", [e.projected for e in examples]))
    rows.append(("the latent seen\nin pixels\ns A z", [e.from_latent for e in examples]))
    grid = [(label, torch.stack([im[:, :side, :side] for im in row])) for label, row in rows]
    return picture(
        grid_png(grid, max(1, 128 // side)),
        "The last row is what the converted model can show before any finetuning; the row above "
        "is the best that these directions allow. Blocks at patch borders are expected.",
    )


def comparisons(report: BasisReport) -> str:
    rows = [
        (item.name, item.s, item.score.r2, item.score.captured, item.score.explained)
        for item in report.comparisons
    ]
    return table(rows, ("basis", "s", "R2", "captured", "explained")) + paragraph(
        "Captured energy alone misleads: PCA captures much, and says nothing about the latents "
        "until it is rotated to them. The mean of the colours must be removed: it holds most of "
        "the energy and tells no image from another."
    )


def convergence(report: BasisReport) -> str:
    lines = {
        "R2": [(float(n), r2) for n, r2, _ in report.convergence],
        "captured": [(float(n), captured) for n, _, captured in report.convergence],
    }
    chart = line_chart(lines, "images used for the fit", "on held-out images", log_x=True)
    return drawing(chart, "Flat at the right end: more images would change nothing.")


def directions(report: BasisReport, A: Tensor) -> str:
    order = sorted(range(report.rank), key=lambda k: -report.column_energy[k])
    strongest = A.T[order].float()
    # Around mid colour, each column in its full contrast: brightness alone tells nothing here.
    contrast = 2.0 * strongest / strongest.abs().amax(1, keepdim=True).clamp(min=1e-12)
    patches = contrast.reshape(-1, 3, report.patch, report.patch)
    shown = report.color.decode(patches).clamp(-1, 1)
    rows = []
    for start in range(0, report.rank, COLUMNS_PER_ROW):
        part = order[start : start + COLUMNS_PER_ROW]
        share = sum(report.column_energy[k] for k in part)
        label = f"{start + 1} - {start + len(part)}\n{share:.1%} of energy"
        rows.append((label, shown[start : start + COLUMNS_PER_ROW]))
    columns = picture(
        grid_png(rows, max(1, SHOWN_SIDE // report.patch)),
        f"The {report.rank} columns of A as {report.patch} x {report.patch} patches, strongest "
        "first. Each is what one number of a latent token stands for in pixels.",
    )
    spectra = {
        "pixels with latents (singular values)": relative(report.spectrum),
        "pixel energy of the columns": relative(sorted(report.column_energy, reverse=True)),
        "pixel energy of the PCA directions": relative(report.pca_energy),
    }
    chart = line_chart(spectra, "direction", "relative to the first", log_y=True)
    return columns + drawing(chart, "Directions that fall far below the others hold mostly noise.")


def relative(values: list[float]) -> list[tuple[float, float]]:
    top = max(values, default=1.0) or 1.0
    return [(float(number), value / top) for number, value in enumerate(values, start=1)]


def origin(report: BasisReport) -> str:
    color = report.color
    mean = ", ".join(f"{value:.4f}" for value in color.mean)
    checked = (
        "not checked: there are none, they name this VAE, or the base has none"
        if report.disagreement is None
        else f"re-encoded a few: they differ by {report.disagreement:.2g} of their energy"
    )
    rows = [
        ("method", report.method),
        ("family", report.family),
        ("patch, rank", f"{report.patch} pixels, {report.rank} of {3 * report.patch**2}"),
        ("scale s", f"{report.s:.6f}"),
        ("colour", f"{color.space}, mean {mean}, std {color.std:.4f}"),
        ("colour statistics", "fitted to these images" if report.color_fitted else "given"),
        ("fitted on", f"{report.num_images} images, {report.num_tokens} tokens"),
        ("judged on", f"{report.num_judges} images: {report.judges}"),
        ("latents made here", str(report.num_encoded)),
        ("cached latents", checked),
        ("skipped", str(sum(report.skipped.values()))),
    ]
    parts = [table(rows)]
    if report.skipped:
        parts.append(paragraph("Skipped samples:"))
        parts.append(table(sorted(report.skipped.items()), ("reason", "samples")))
        named = [(line,) for line in report.skipped_samples[:MOST_NAMED]]
        parts.append(table(named, ("the first of them",)))
    return "".join(parts)

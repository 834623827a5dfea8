"""The page of a basis shows what the basis does, and its numbers survive JSON."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asymlift.data.pictures import image_to_float
from asymlift.maths.basis import Alignment, random_basis
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.report.basis_report import (
    BasisReport,
    Comparison,
    basis_page,
    middle,
    renderings,
)

PATCH, LATENT_PATCH, D, d = 8, 2, 192, 16
COLOR = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)
SCORE = Alignment(r2=0.7, captured=0.8, explained=0.56, cosine=0.85)


REPORT = BasisReport(
    path=Path("basis.safetensors"),
    page=Path("basis-report.html"),
    verdict="good",
    method="procrustes",
    family="flux2",
    patch=PATCH,
    rank=d,
    s=2.0,
    color=COLOR,
    color_fitted=False,
    score=SCORE,
    num_images=10,
    num_tokens=120,
    num_judges=4,
    judges="held out of training",
    comparisons=[Comparison("other", 1.0, SCORE)],
    convergence=[(8, 0.6, 0.7), (10, 0.7, 0.8)],
    spectrum=[2.0] * d,
    column_energy=[0.05] * d,
    pca_energy=[0.06] * d,
    num_encoded=0,
    disagreement=None,
)


def test_a_report_survives_json_but_for_its_paths():
    report = replace(REPORT, skipped={"no image": 2}, skipped_samples=["a.tar!b: no image"])
    facts = json.loads(json.dumps(report.facts()))
    again = BasisReport.from_facts(facts, report.path, report.page)
    assert again.already_done and again.facts() == report.facts()
    assert "path" not in facts and "page" not in facts


def test_renderings_show_the_subspace_and_the_latent():
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(90, 160, (3, 24, 32), dtype=torch.uint8, generator=draw)
    A = random_basis(D, D, draw).float()
    x = image_to_tokens(COLOR.encode(image_to_float(image)[None]), PATCH)
    report = replace(REPORT, rank=D)
    # A latent of 48 channels: with a full basis nothing is lost.
    latent = tokens_to_image(x @ A / report.s, LATENT_PATCH, (3, 4))[0]

    shown = renderings(image, latent, None, report, A, LATENT_PATCH)

    assert torch.equal(shown.original, middle(image_to_float(image), PATCH))
    assert (shown.projected - shown.original).abs().max() < 1e-3
    assert (shown.from_latent - shown.original).abs().max() < 1e-3
    assert shown.autoencoder is None


@pytest.mark.parametrize("height, width", [(24, 32), (700, 400), (8, 80)])
def test_the_middle_lies_on_patch_borders_and_is_small(height, width):
    rows = torch.arange(height).view(1, -1, 1).expand(3, height, width)
    cut = middle(rows, PATCH)
    assert cut.shape[1] == cut.shape[2] <= 256 and cut.shape[1] % PATCH == 0
    assert int(cut[0, 0, 0]) % PATCH == 0


@pytest.mark.parametrize("verdict", ["good", "marginal", "poor"])
def test_a_page_says_its_verdict_first_and_names_what_was_skipped(verdict):
    image = torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8)
    skipped = [f"000.tar!{n:03d}: no image" for n in range(60)]
    report = replace(REPORT, verdict=verdict, skipped={"no image": 60}, skipped_samples=skipped)
    A = random_basis(D, d, torch.Generator().manual_seed(0)).float()
    example = renderings(
        image, torch.zeros(4, 4, 4), image_to_float(image), report, A, LATENT_PATCH
    )
    page = basis_page(report, A, [example])
    assert f'<p class="{verdict}">{verdict.capitalize()}.' in page
    assert "000.tar!049" in page and "000.tar!050" not in page
    assert page.count("data:image/png") == 2 and page.count("<svg") == 2
    assert "No picture to show" in basis_page(report, A, [])

"""fit-basis finds the subspace that made the latents, and nothing can change what it finds."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from asymlift.artifacts.basis_file import load_basis
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.data import catalog
from asymlift.data.buckets import Fit
from asymlift.data.catalog import open_catalog
from asymlift.data.pairs import PairReader
from asymlift.data.pictures import encode_png, image_to_float
from asymlift.data.records import LATENT, Sample
from asymlift.data.table import index_path, index_shard, load_table
from asymlift.data.writer import Packed, packed_sample, write_shard
from asymlift.embedded import MODELS, PIXEL_MEAN, PIXEL_STD
from asymlift.embedded.scenes import make_scenes
from asymlift.errors import BadData, CannotWrite, StoppedEarly
from asymlift.families import FAMILIES
from asymlift.families.base import Geometry
from asymlift.maths.basis import principal_angles, random_basis
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.recipe import CaptionSection, DataSection, ResizeSection
from asymlift.report.basis_report import BasisReport
from asymlift.stages import basis_statistics
from asymlift.stages.basis_statistics import cut
from asymlift.stages.fit_basis import Autoencoder, FitPlan, fit_basis

SIZES = Geometry(vae_factor=4, channels=4, patch=2)  # p = 8, d = 16, D = 192
PATCH, HEIGHT, WIDTH = SIZES.pixel_patch, 24, 32
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
COLOR = ColorCode("oklab", (0.56, 0.0, 0.01), 0.16)
TRUE_S = 2.5
NUM_IMAGES, NUM_FIT, NUM_JUDGES = 190, 150, 40


def smooth_images(number: int, seed: int) -> Tensor:
    """uint8 (n, 3, H, W) with more energy in low frequencies, as photographs have."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(number, 3, HEIGHT // 4, WIDTH // 4, generator=draw)
    image = functional.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic") * 45 + 120
    image += torch.randn(image.shape, generator=draw) * 12
    return image.clamp(0, 255).to(torch.uint8)


def tokens_of(images: Tensor, color: ColorCode = COLOR) -> Tensor:
    return image_to_tokens(color.encode(image_to_float(images).double()), PATCH)


def latents_from(images: Tensor, A: Tensor, s: float, noise: float = 0.0, seed: int = 0) -> Tensor:
    """z = A^T x / s and noise: a VAE whose answer is known."""
    z = tokens_of(images) @ A / s
    draw = torch.Generator().manual_seed(seed)
    z = z + noise * z.std() * torch.randn(z.shape, generator=draw, dtype=z.dtype)
    return tokens_to_image(z, SIZES.patch, GRID).float()


def samples_of(images: Tensor, latents: Tensor | None, prefix: str = "") -> list[Sample]:
    return [
        Sample(f"{prefix}{i:04d}", image, latent=None if latents is None else latents[i])
        for i, image in enumerate(images)
    ]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return smooth_images(NUM_IMAGES, 0)


@pytest.fixture(scope="module")
def true_basis(images: Tensor) -> Tensor:
    """Principal directions, rotated: for these, and hardly any other, Procrustes is exact."""
    x = tokens_of(images).flatten(0, 1)
    vectors = torch.linalg.eigh(x.T @ x)[1][:, -SIZES.d :]
    return vectors @ random_basis(SIZES.d, SIZES.d, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(images: Tensor, true_basis: Tensor) -> list[Sample]:
    """Samples with somewhat noisy latents."""
    return samples_of(images, latents_from(images, true_basis, TRUE_S, noise=0.4))


def write(folder: Path, samples: list[Sample], per_shard: int = 64, **how: object) -> str:
    for number, start in enumerate(range(0, len(samples), per_shard)):
        write_shard(folder / f"{number:03d}.tar", samples[start : start + per_shard], **how)
    return str(folder / "*.tar")


def write_foreign(path: Path, members: dict[str, bytes]) -> None:
    """A shard as others make them: no index, no checks."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def train(made: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("shards"), made)


def plan_for(train: str | list[str], out: Path, **changes: object) -> FitPlan:
    """`changes` are of the plan or of its data."""
    section = {"train": train, "workers": 0, "resize": ResizeSection(sides=[HEIGHT])}
    section |= {name: changes.pop(name) for name in DataSection.model_fields if name in changes}
    plan = FitPlan(
        DataSection(**section), FAMILIES["flux2"], SIZES, out, images=NUM_FIT, holdout=NUM_JUDGES
    )
    return dataclasses.replace(plan, **changes)


def fitted(plan: FitPlan) -> tuple[BasisReport, Tensor, bytes]:
    report = fit_basis(plan)
    assert report is not None
    return report, load_basis(report.path).A, report.path.read_bytes()


class Reference(NamedTuple):
    report: BasisReport
    A: Tensor
    data: bytes


@pytest.fixture(scope="module")
def reference(train: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The undisturbed fit that everything is compared with."""
    return Reference(*fitted(plan_for(train, tmp_path_factory.mktemp("reference"))))


def same_projector(A: Tensor, B: Tensor) -> float:
    A, B = A.double(), B.double()
    return float((A @ A.T - B @ B.T).abs().max())


# ---- it finds what is there ------------------------------------------------------------------


def test_the_subspace_and_scale_that_made_the_latents_are_found(images, true_basis, tmp_path):
    train = write(tmp_path / "train", samples_of(images, latents_from(images, true_basis, TRUE_S)))
    new = smooth_images(NUM_JUDGES, 7)
    valid = write(tmp_path / "new", samples_of(new, latents_from(new, true_basis, TRUE_S), "v"))

    plan = plan_for(train, tmp_path / "run", images=NUM_IMAGES, validation=valid)
    report, A, _ = fitted(plan)

    assert principal_angles(A.double(), true_basis).max() < 1e-5  # latents are stored in float32
    assert (A - true_basis).abs().max() < 1e-5  # not only the subspace: its directions
    assert report.s == pytest.approx(TRUE_S, rel=1e-6)
    assert report.score.r2 == pytest.approx(1, abs=1e-9)
    assert report.score.explained == pytest.approx(report.score.captured * report.score.r2)
    assert (report.num_images, report.num_judges) == (NUM_IMAGES, NUM_JUDGES)
    assert report.judges == "validation data"


def test_moments_on_disk_give_the_basis_of_a_naive_loop(train, made, reference):
    """Per image, all in float64: the textbook, on the images that fit-basis chose."""
    by_key = {sample.key: sample for sample in made}
    cross = torch.zeros(SIZES.d, SIZES.D, dtype=torch.float64)
    energy_z, pixels = 0.0, []
    for record in open_catalog(train, Fit((HEIGHT,), PATCH)).lowest_hashes(NUM_FIT):
        sample = by_key[record.key]
        x = tokens_of(sample.image[None])[0]
        z = image_to_tokens(sample.latent[None].double(), SIZES.patch)[0]
        cross += z.T @ x
        energy_z += float(z.square().sum())
        pixels.append(x)
    U, _, Vh = torch.linalg.svd(cross, full_matrices=False)
    naive = (U @ Vh).T
    s = float(sum((x @ naive).square().sum() for x in pixels) / energy_z) ** 0.5

    assert principal_angles(reference.A.double(), naive).max() < 1e-5
    assert reference.report.s == pytest.approx(s, rel=1e-6)


def test_the_basis_carries_its_provenance(reference):
    report, A, _ = reference
    basis = load_basis(report.path)
    assert basis.color == COLOR and basis.patch == PATCH and basis.family == "flux2"
    assert (basis.method, basis.num_images, basis.vae_fingerprint) == ("procrustes", NUM_FIT, None)
    assert basis.alignment["r2"] == report.r2 and len(basis.spectrum) == SIZES.d
    assert basis.facts["sources"] == ["000.tar", "001.tar", "002.tar"]
    assert str(report.path.parent.parent) not in str(basis.facts)
    assert torch.dist(A.T @ A, torch.eye(SIZES.d)) < 1e-5


def test_the_other_choices_are_reported_on_the_same_images(reference):
    report = reference.report
    scores = {item.name: item.score for item in report.comparisons}
    own = scores["Procrustes (this basis)"]
    assert own == report.score and report.verdict == "good" and own.r2 > 0.6
    assert scores["this basis, least-squares s"].r2 >= own.r2
    assert scores["PCA, not rotated to the latents"].captured >= own.captured - 1e-3
    assert scores["PCA, not rotated to the latents"].r2 < 0.3
    assert scores["random directions"].r2 < 0


def test_a_mean_that_is_left_in_spoils_the_fit(reference):
    report = reference.report
    (left_in,) = [c.score for c in report.comparisons if "left in" in c.name]
    assert left_in.captured > report.score.captured + 0.05
    assert left_in.r2 < report.score.r2 - 0.3


def test_the_colour_statistics_can_be_fitted(train, images, tmp_path):
    report, _, _ = fitted(plan_for(train, tmp_path, mean="fit", std="fit"))
    raw = ColorCode("oklab", (0, 0, 0), 1).encode(image_to_float(images).double())
    mean = raw.mean((0, 2, 3))
    std = (raw - mean[:, None, None]).square().mean().sqrt()
    assert report.color.mean == pytest.approx(mean.tolist(), abs=0.01)
    assert report.color.std == pytest.approx(float(std), rel=0.05)
    assert report.color_fitted and load_basis(report.path).color == report.color


def test_pca_keeps_its_own_subspace_but_turns_to_the_latents(train, reference, tmp_path):
    report, _, _ = fitted(plan_for(train, tmp_path, method="pca"))
    other = reference.report
    assert report.score.captured >= other.score.captured
    assert report.r2 == pytest.approx(
        next(c.score.r2 for c in other.comparisons if c.name == "PCA, rotated to the latents")
    )


def test_a_few_tokens_per_image_find_nearly_the_same(train, reference, tmp_path):
    whole = reference.report
    few, _, _ = fitted(plan_for(train, tmp_path, tokens_per_image=6))
    assert (few.num_tokens, whole.num_tokens) == (6 * NUM_FIT, 12 * NUM_FIT)
    assert abs(few.r2 - whole.r2) < 0.02


def test_convergence_is_read_at_powers_of_two_and_at_the_end(reference):
    report = reference.report
    assert [n for n, _, _ in report.convergence] == [8, 16, 32, 64, 128, 150]
    assert report.convergence[-1][1:] == (report.score.r2, report.score.captured)
    assert report.convergence[0][1] < report.convergence[-1][1]


@pytest.mark.parametrize("number", [1, 2, 3, 64, 65, 128, 1000, 5000, 100_000])
def test_chunks_cover_everything_once_and_stay_few(number):
    samples = list(range(number))
    chunks = cut("fit", samples, smallest=8)  # type: ignore[arg-type]
    assert [s for chunk in chunks for s in chunk.records] == samples
    ends = {chunks[0].records[0]} | {chunk.records[-1] + 1 for chunk in chunks}
    assert ends >= {2**k for k in range(3, 20) if 2**k <= number}
    assert len(chunks) <= 80
    assert number > 4096 or max(len(chunk.records) for chunk in chunks) <= 64


# ---- R9: nothing changes what it finds -------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_of_samples_and_shards_does_not_matter(made, reference, tmp_path, seed):
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(NUM_IMAGES, generator=draw).tolist()
    train = write(tmp_path / "shards", [made[i] for i in order], per_shard=[7, 50, 400][seed])
    shards = sorted(map(str, Path(train).parent.glob("*.tar")), reverse=bool(seed % 2))

    _, A, _ = fitted(plan_for(shards, tmp_path / "run", workers=seed))

    assert same_projector(A, reference.A) <= 1e-10
    assert torch.equal(A, reference.A)  # it is even the same bits


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_bytes(train, reference, tmp_path, world):
    report = fitted_by_ranks(train, tmp_path, world)
    assert report.path.read_bytes() == reference.data


def fitted_by_ranks(train: str, out: Path, world: int) -> BasisReport:
    """All ranks at once; rank 0 has to wait for the others."""
    reports: dict[int, BasisReport | None] = {}
    threads = [
        threading.Thread(target=lambda plan=plan: reports.update({plan.rank: fit_basis(plan)}))
        for plan in [plan_for(train, out, rank=rank, world=world) for rank in range(world)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    report = reports.pop(0)
    assert report is not None and list(reports.values()) == [None] * (world - 1)
    return report


def test_ranks_may_index_the_same_shard_at_once(train, reference, tmp_path, monkeypatch):
    """None is indexed before all have begun to, and then all of them write the index."""
    world, shards = 3, tmp_path / "shards"
    shutil.copytree(Path(train).parent, shards, ignore=shutil.ignore_patterns("*.index.*"))
    scanned = threading.Barrier(world)

    def scan_together(path: Path) -> object:
        table = index_shard(path)
        scanned.wait(30)
        return table

    monkeypatch.setattr(catalog, "index_shard", scan_together)
    monkeypatch.setenv("ASYMLIFT_CACHE", str(tmp_path / "cache"))

    report = fitted_by_ranks(str(shards / "*.tar"), tmp_path / "run", world)

    assert torch.equal(load_basis(report.path).A, reference.A)
    found = sorted(shards.glob("*.tar"))
    assert all(load_table(path, index_path(path)) is not None for path in found)
    assert len(list(shards.iterdir())) == 2 * len(found) and not (tmp_path / "cache").exists()


def test_ranks_may_run_one_after_the_other(train, reference, tmp_path):
    for rank in (2, 1, 0):
        report = fit_basis(plan_for(train, tmp_path, rank=rank, world=3))
    assert report is not None and report.path.read_bytes() == reference.data


def test_rank_0_does_the_work_of_a_rank_that_is_gone(train, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(basis_statistics, "PATIENCE", 0.3)
    report = fit_basis(plan_for(train, tmp_path, rank=0, world=3))
    assert report is not None and report.path.read_bytes() == reference.data
    assert fit_basis(plan_for(train, tmp_path, rank=1, world=3)) is None  # late, and no harm
    assert not (tmp_path / "basis-statistics").exists()


def test_a_rank_that_is_overtaken_leaves_quietly(train, tmp_path, monkeypatch):
    calls = iter(range(1000))

    def clean_up_meanwhile() -> bool:
        if next(calls) == 2:
            fit_basis(plan_for(train, tmp_path, world=2))
        return False

    monkeypatch.setattr(basis_statistics, "PATIENCE", 0.0)
    late = plan_for(train, tmp_path, rank=1, world=2)
    assert fit_basis(late, stop=clean_up_meanwhile) is None
    assert not (tmp_path / "basis-statistics").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 20, 100, 175])
def test_a_fit_that_is_killed_and_run_again_gives_the_same_bytes(
    train, reference, tmp_path, monkeypatch, moment
):
    """Cut down in the middle of a chunk."""
    read, asked = PairReader.tokens, []

    def counted(self: PairReader, sample: object) -> tuple[Tensor, Tensor]:
        asked.append(sample)
        if len(asked) == moment:
            raise Killed
        return read(self, sample)  # type: ignore[arg-type]

    monkeypatch.setattr(PairReader, "tokens", counted)
    with pytest.raises(Killed):
        fit_basis(plan_for(train, tmp_path))
    assert not (tmp_path / "basis.safetensors").exists()
    report = fit_basis(plan_for(train, tmp_path))
    assert report is not None and report.path.read_bytes() == reference.data
    assert len(asked) - NUM_IMAGES <= min(moment, 64)  # at most one chunk is read twice


def test_kill_9_and_the_same_command_again(train, reference, tmp_path):
    """The real signal, sent to the real process as soon as a few chunks are there."""
    script = """
import sys, time
from pathlib import Path
from asymlift.data.pairs import PairReader
from asymlift.stages.fit_basis import fit_basis
from tests.stages.test_fit_basis import plan_for
read = PairReader.tokens
PairReader.tokens = lambda self, sample: time.sleep(0.02) or read(self, sample)
fit_basis(plan_for(sys.argv[1], Path(sys.argv[2])))
"""
    command = [sys.executable, "-c", script, train, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        while process.poll() is None and len(list(statistics_in(tmp_path))) < 3:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= len(list(statistics_in(tmp_path))) < 7
    report = fit_basis(plan_for(train, tmp_path))
    assert report is not None and report.path.read_bytes() == reference.data


def test_a_stop_is_clean_and_the_next_run_goes_on(train, reference, tmp_path):
    calls = iter(range(1000))
    with pytest.raises(StoppedEarly, match="stopped after 2 of 7 chunks; the same command goes"):
        fit_basis(plan_for(train, tmp_path), stop=lambda: next(calls) == 2)
    report = fit_basis(plan_for(train, tmp_path))
    assert report is not None and report.path.read_bytes() == reference.data


def statistics_in(folder: Path) -> Iterator[Path]:
    return (folder / "basis-statistics").glob("*/*.safetensors")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_statistics_are_made_again(train, reference, tmp_path, damage):
    fit_basis(plan_for(train, tmp_path, keep_statistics=True))
    for path in list(statistics_in(tmp_path))[:4]:
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-50]), "empty": b""}[damage])
    (tmp_path / "basis.safetensors").unlink()
    report = fit_basis(plan_for(train, tmp_path))
    assert report is not None and report.path.read_bytes() == reference.data


def test_a_second_run_finds_the_work_done(train, tmp_path, monkeypatch):
    first, _, data = fitted(plan_for(train, tmp_path))
    assert not (tmp_path / "basis-statistics").exists()
    monkeypatch.setattr(PairReader, "tokens", None)
    again = fit_basis(plan_for(train, tmp_path))
    assert again == dataclasses.replace(first, already_done=True)
    assert first.path.read_bytes() == data


def test_changed_shards_or_settings_do_not_reuse_what_was_made(made, tmp_path):
    train = write(tmp_path / "shards", made[:60])
    plan = plan_for(train, tmp_path / "run", images=40, holdout=20, keep_statistics=True)
    plan = dataclasses.replace(plan, mean="fit", std="fit")
    fit_basis(plan)
    changes = [{"space": "rgb"}, {"tokens_per_image": 3}, {"images": 30}]
    for number, change in enumerate(changes, start=2):
        fit_basis(dataclasses.replace(plan, overwrite=True, **change))
        assert len(list((tmp_path / "run/basis-statistics").iterdir())) == number
    shard = Path(train).parent / "000.tar"
    os.utime(shard, ns=(1, 1))  # the index knows the sha256 ...
    fit_basis(dataclasses.replace(plan, overwrite=True))
    assert len(list((tmp_path / "run/basis-statistics").iterdir())) == number
    for time_ns in (1, 2):  # ... and one that was made here does not
        index_path(shard).unlink()
        os.utime(shard, ns=(time_ns, time_ns))
        fit_basis(dataclasses.replace(plan, overwrite=True))
        assert len(list((tmp_path / "run/basis-statistics").iterdir())) == number + time_ns


# ---- what is refused -------------------------------------------------------------------------


def test_a_basis_of_other_settings_is_not_overwritten(train, tmp_path):
    first, _, data = fitted(plan_for(train, tmp_path))
    other = plan_for(train, tmp_path, method="pca")
    with pytest.raises(CannotWrite, match=r"basis\.safetensors: a basis made with other settings"):
        fit_basis(other)
    assert first.path.read_bytes() == data
    report, _, _ = fitted(dataclasses.replace(other, overwrite=True))
    assert report.method == "pca" and report.path.read_bytes() != data


def test_latents_that_say_nothing_are_refused_unless_accepted(images, tmp_path, monkeypatch):
    noise = torch.randn(NUM_IMAGES, 4, 6, 8, generator=torch.Generator().manual_seed(3))
    plan = plan_for(write(tmp_path / "shards", samples_of(images, noise)), tmp_path / "run")
    with pytest.raises(BadData) as caught:
        fit_basis(plan)
    message = str(caught.value)
    assert re.search(r"held-out R2 = -\d\.\d{3}, below 0 \(captured 0\.\d+, explained -", message)
    assert "--accept-poor-fit" in message and len(message.splitlines()) == 3
    assert not (tmp_path / "run/basis.safetensors").exists()
    assert "Poor." in (tmp_path / "run/basis-report.html").read_text()

    monkeypatch.setattr(PairReader, "tokens", None)  # nothing is read again
    report, _, _ = fitted(dataclasses.replace(plan, accept_poor_fit=True))
    assert report.verdict == "poor" and report.r2 < 0
    again = fit_basis(dataclasses.replace(plan, accept_poor_fit=True))
    assert again is not None and again.already_done


def test_a_colour_mean_that_is_wrong_is_named_as_the_cause(train, tmp_path):
    plan = plan_for(train, tmp_path, space="rgb", mean=(0.0, 0.0, 0.0), std=0.2)
    with pytest.raises(BadData, match=r"of these images R2 would be 0\.[4-9]\d\d: set color\.mean"):
        fit_basis(plan)
    report, _, _ = fitted(dataclasses.replace(plan, mean="fit", std="fit"))
    assert report.verdict != "poor" and report.r2 > 0.4


def test_a_marginal_fit_is_called_so(images, true_basis, tmp_path):
    latents = latents_from(images, true_basis, TRUE_S, noise=1.2)
    train = write(tmp_path / "shards", samples_of(images, latents))
    report, _, _ = fitted(plan_for(train, tmp_path / "run"))
    assert report.verdict == "marginal" and 0 <= report.r2 < 0.5


def bad_sample(key: str, kind: str) -> Packed:
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    packed = packed_sample(Sample(key, image))
    latent = {
        "latent holds NaN or infinity": torch.full((4, 6, 8), torch.nan),
        "latent has the wrong number of channels": torch.zeros(16, 6, 8),
        "latent has the wrong shape": torch.zeros(4, 6, 40),
    }.get(kind)
    changed = {} if latent is None else {LATENT: save({"latent": latent})}
    if kind == "image cannot be decoded":
        changed = {".png": encode_png(image)[:500]}
    return dataclasses.replace(packed, members={**packed.members, **changed})


BAD = [
    "latent holds NaN or infinity",
    "latent has the wrong number of channels",
    "latent has the wrong shape",
    "image cannot be decoded",
    "no cached latent",
]


def test_bad_samples_are_skipped_counted_and_named(made, tmp_path):
    train = write(tmp_path / "shards", made)
    bad = [bad_sample(f"bad{n}", kind) for n, kind in enumerate(BAD)]
    write_shard(tmp_path / "shards/900.tar", [*bad, made[0]])
    write_foreign(tmp_path / "shards/901.tar", {"bad9.png": b""})
    total = NUM_IMAGES + len(BAD)
    plan = plan_for(train, tmp_path / "run", images=total - NUM_JUDGES, max_bad_fraction=0.05)

    report, _, _ = fitted(plan)

    assert report.skipped == dict.fromkeys([*BAD, "empty member", "duplicate key"], 1)
    assert report.num_images + report.num_judges == NUM_IMAGES
    assert sorted(line.split(":")[0] for line in report.skipped_samples) == [
        "900.tar!0000",
        *(f"900.tar!bad{n}" for n in range(len(BAD))),
        "901.tar!bad9",
    ]
    assert "900.tar!0000: duplicate key (also in 000.tar)" in report.skipped_samples
    page = (tmp_path / "run/basis-report.html").read_text()
    assert all(f"900.tar!bad{n}" in page for n in range(len(BAD)))
    assert str(tmp_path) not in page

    with pytest.raises(
        BadData, match=r"\d of \d+ samples cannot be used .*allowed are 1\.00%"
    ) as e:
        fit_basis(plan_for(train, tmp_path / "strict", images=plan.images, max_bad_fraction=0.01))
    assert ".tar!bad" in str(e.value) and len(str(e.value).splitlines()) == 2


def test_a_missing_shard_counts_as_much_as_the_others_hold(made, tmp_path, capsys):
    write(tmp_path / "shards", made)
    train = f"{tmp_path}/shards/{{000..003}}.tar"
    report, _, _ = fitted(plan_for(train, tmp_path / "run", max_bad_fraction=0.26))
    assert report.skipped == {"shard is missing": round(NUM_IMAGES / 3)}
    assert report.skipped_samples[0].startswith("003.tar: shard is missing")
    assert "left out, shard is missing" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(BadData, match=r"63 of 253 samples cannot be used \(shard is missing 63\)"):
        fit_basis(plan_for(train, tmp_path / "strict", max_bad_fraction=0.24))


def test_pictures_of_an_unusable_size_are_told_but_are_no_fault(made, tmp_path, capsys):
    train = write(tmp_path / "shards", made)
    small = torch.zeros(3, 16, 16, dtype=torch.uint8)
    write_shard(tmp_path / "shards/900.tar", [Sample(f"small{n}", small) for n in range(9)])
    report, _, _ = fitted(plan_for(train, tmp_path / "run", max_bad_fraction=0.0))
    assert report.skipped == {} and report.num_images + report.num_judges == NUM_IMAGES
    said = " ".join(capsys.readouterr().err.split())
    assert "9 left out, too small" in said and "and 7 more" in said


def test_latents_are_missing_and_there_is_no_vae(images, tmp_path):
    train = write(tmp_path / "shards", samples_of(images, None))
    with pytest.raises(BadData, match=r"cannot be used \(no cached latent \d+\)"):
        fit_basis(plan_for(train, tmp_path / "run"))


@pytest.mark.parametrize(
    "number, message",
    [
        (1, "1 usable images are too few: at least one must fit the basis and another judge it"),
        (2, "12 tokens of 1 images to fit and 12 to judge are too few for 16 directions"),
    ],
)
def test_too_few_images_are_refused(made, tmp_path, number, message):
    train = write(tmp_path / "shards", made[:number])
    with pytest.raises(BadData, match=message):
        fit_basis(plan_for(train, tmp_path / "run"))


def test_fewer_images_than_asked_for_are_shared_out(made, tmp_path, capsys):
    train = write(tmp_path / "shards", made[:95])
    report, _, _ = fitted(plan_for(train, tmp_path / "run"))
    assert (report.num_images, report.num_judges) == (75, 20)
    assert "95 images where 190 are asked for" in " ".join(capsys.readouterr().err.split())


def test_latents_that_are_all_zero_are_refused(images, tmp_path):
    train = write(tmp_path / "shards", samples_of(images, torch.zeros(NUM_IMAGES, 4, 6, 8)))
    with pytest.raises(BadData, match="every cached latent is zero"):
        fit_basis(plan_for(train, tmp_path / "run"))


def of_one_color(level: int, folder: Path) -> str:
    images = torch.full((40, 3, HEIGHT, WIDTH), level, dtype=torch.uint8)
    return write(folder, samples_of(images, torch.randn(40, 4, 6, 8)))


@pytest.mark.parametrize("level, missing", [(0, "mean of the colours left in"), (90, "")])
def test_pictures_of_one_colour_have_no_statistics_to_compare(level, missing, tmp_path):
    """The published mean is another colour, so that a basis can be fitted all the same."""
    train = of_one_color(level, tmp_path / "shards")
    report, _, _ = fitted(plan_for(train, tmp_path / "run", accept_poor_fit=True))
    names = {row.name for row in report.comparisons}
    assert (
        not names & {missing, "colour mean and std of these images"}
        and "random directions" in names
    )


@pytest.mark.parametrize("level", [0, 90])
def test_pictures_of_the_mean_colour_alone_are_refused(level, tmp_path):
    train = of_one_color(level, tmp_path / "shards")
    with pytest.raises(BadData, match=r"000\.tar|\*\.tar") as refused:
        fit_basis(plan_for(train, tmp_path / "run", mean="fit", std="fit"))
    assert "that fit the basis are of one colour" in str(refused.value)


def test_a_folder_that_cannot_be_written_is_named(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot write here"):
        fit_basis(plan_for(train, tmp_path / "file" / "run"))


def test_two_runs_at_once_do_not_mix(train, tmp_path):
    def try_another() -> bool:
        with pytest.raises(CannotWrite, match="another process"):
            fit_basis(plan_for(train, tmp_path))
        return False

    assert fit_basis(plan_for(train, tmp_path), stop=try_another) is not None


# ---- with the base's VAE ---------------------------------------------------------------------

BASE = Path(MODELS["tiny-good-vae"])


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and what the embedded VAE makes of them."""
    images = (make_scenes(range(90), seed=0).image * 255).round().to(torch.uint8)
    vae = Autoencoder(DiffusersFolder(BASE), FAMILIES["flux2"], "cpu")
    return images, torch.cat([vae.encode(image_to_float(image)[None]) for image in images])


def scene_plan(train: str, out: Path, **changes: object) -> FitPlan:
    given = {"space": "rgb", "mean": PIXEL_MEAN, "std": PIXEL_STD, "images": 70, "holdout": 20}
    given |= {"base": BASE, "resize": ResizeSection(sides=[32])}
    return plan_for(train, out, **{**given, **changes})


def test_latents_made_here_give_the_basis_of_cached_ones(scenes, tmp_path):
    images, latents = scenes
    cached = write(tmp_path / "cached", samples_of(images, latents))
    plain = write(tmp_path / "plain", samples_of(images, None))
    first, A, _ = fitted(scene_plan(cached, tmp_path / "one"))
    second, B, _ = fitted(scene_plan(plain, tmp_path / "two"))
    assert (first.num_encoded, second.num_encoded) == (0, 90)
    assert same_projector(A, B) < 1e-4
    assert first.r2 > 0.6 and first.r2 == pytest.approx(second.r2, abs=1e-4)
    assert first.disagreement < 1e-6 and second.disagreement is None
    assert load_basis(first.path).vae_fingerprint == DiffusersFolder(BASE).fingerprint("vae")


def test_a_cache_of_other_images_is_refused_before_any_work(scenes, tmp_path):
    """Shapes fit and nothing is broken, so only encoding again can tell."""
    images, latents = scenes
    train = write(tmp_path / "shards", samples_of(images, latents.roll(1, 0)))
    with pytest.raises(
        BadData, match=r"differs from what the base's VAE makes .* by [1-9]\.\d\d of"
    ):
        fit_basis(scene_plan(train, tmp_path / "run"))
    assert not list(statistics_in(tmp_path / "run"))


def test_a_cache_in_another_normalisation_is_refused(scenes, tmp_path):
    images, latents = scenes
    train = write(tmp_path / "shards", samples_of(images, latents * 0.3611))
    with pytest.raises(BadData, match="4 of 4 differ by more than"):
        fit_basis(scene_plan(train, tmp_path / "run"))


VAE = {"family": "flux2", "vae": DiffusersFolder(BASE).fingerprint("vae")}


def test_latents_that_this_vae_prepared_are_not_made_again(scenes, tmp_path, monkeypatch):
    samples = samples_of(*scenes)
    foreign = write(tmp_path / "foreign", samples)
    prepared = write(tmp_path / "prepared", samples, made=VAE)
    _, A, _ = fitted(scene_plan(foreign, tmp_path / "one"))
    monkeypatch.setattr(PairReader, "disagreement", None)
    report, B, _ = fitted(scene_plan(prepared, tmp_path / "two"))
    assert report.disagreement is None and torch.equal(A, B)


def test_foreign_shards_beside_prepared_ones_are_still_compared(scenes, tmp_path):
    images, latents = scenes
    train = write(tmp_path / "shards", samples_of(images[:60], latents[:60]), made=VAE)
    write_shard(tmp_path / "shards/900.tar", samples_of(images[60:], latents[60:].roll(1, 0), "f"))
    with pytest.raises(BadData, match=r"900\.tar!f.* differs from what the base's VAE makes"):
        fit_basis(scene_plan(train, tmp_path / "run"))


@pytest.mark.parametrize(
    "other, said",
    [
        ({"vae": "sha256:0"}, f"vae sha256:0,\nbut this recipe has {VAE['vae']}"),
        ({"family": "sd3"}, "family sd3,\nbut this recipe has flux2"),
        (
            {"resize": {"sides": [64]}},
            "resize {'sides': [64]},\nbut this recipe has {'sides': [32]",
        ),
    ],
)
def test_data_that_was_prepared_otherwise_is_refused(scenes, tmp_path, other, said):
    train = write(tmp_path / "shards", samples_of(*scenes), made={**VAE, **other})
    with pytest.raises(BadData, match=re.escape(said)):
        fit_basis(scene_plan(train, tmp_path / "run"))


# ---- pictures that nobody prepared -----------------------------------------------------------


def write_pictures(folder: Path, images: list[Tensor]) -> str:
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / f"{i:04d}.png").write_bytes(encode_png(image))
    return str(folder)


def test_a_folder_a_table_and_shards_of_the_same_pictures_give_the_same_basis(scenes, tmp_path):
    images, _ = scenes
    shards = write(tmp_path / "shards", samples_of(images, None))
    folder = write_pictures(tmp_path / "folder", list(images))
    table = tmp_path / "folder" / "list.jsonl"
    rows = [{"image": f"{i:04d}.png", "text": "a scene"} for i in range(len(images))]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))

    _, A, _ = fitted(scene_plan(shards, tmp_path / "one"))
    report, B, _ = fitted(scene_plan(folder, tmp_path / "two"))
    _, C, _ = fitted(scene_plan(str(table), tmp_path / "three"))

    assert torch.equal(A, B) and torch.equal(A, C)
    assert report.num_encoded == 90 and load_basis(report.path).facts["sources"] == ["folder"]


def test_captions_and_labels_play_no_part(scenes, tmp_path):
    folder = write_pictures(tmp_path / "folder", list(scenes[0]))
    _, _, data = fitted(scene_plan(folder, tmp_path / "one"))
    caption = CaptionSection(source="label", labels="there is no such column")
    second, _, same = fitted(scene_plan(folder, tmp_path / "two", caption=caption))
    assert same == data and second.skipped == {}


def test_pictures_of_several_sizes_are_cut_to_their_buckets(tmp_path):
    sizes = [(32, 32), (40, 70), (70, 40), (200, 100)] * 24
    images = [make_scenes([i], seed=0, size=max(size)).image[0] for i, size in enumerate(sizes)]
    cut_out = [
        (image[:, :height, :width] * 255).round().to(torch.uint8)
        for image, (height, width) in zip(images, sizes, strict=True)
    ]
    folder = write_pictures(tmp_path / "folder", cut_out)
    changes = {"images": 76, "holdout": 20, "mean": "fit", "std": "fit"}
    report, _, _ = fitted(scene_plan(folder, tmp_path / "run", **changes))
    chosen = open_catalog(folder, Fit((32,), PATCH)).lowest_hashes(76)
    squares = sum(int(record.key) % 4 == 0 for record in chosen)  # 16 tokens; 24 x 40 has 15
    assert report.skipped == {} and report.num_images == 76
    assert report.num_tokens == 15 * 76 + squares


def test_a_folder_that_moves_is_the_same_data_and_an_edited_picture_is_not(scenes, tmp_path):
    folder = write_pictures(tmp_path / "folder", list(scenes[0]))
    out = tmp_path / "run"
    fitted(scene_plan(folder, out))
    moved = str((tmp_path / "folder").rename(tmp_path / "moved"))
    again = fit_basis(scene_plan(moved, out))
    assert again is not None and again.already_done
    (tmp_path / "moved/0000.png").write_bytes(encode_png(scenes[0][1]))
    with pytest.raises(CannotWrite, match="or from other data"):
        fit_basis(scene_plan(moved, out))


def test_a_copy_of_written_shards_is_the_same_data(made, tmp_path):
    train = write(tmp_path / "shards", made)
    fitted(plan_for(train, tmp_path / "run"))
    shutil.copytree(tmp_path / "shards", tmp_path / "copy", copy_function=shutil.copyfile)
    again = fit_basis(plan_for(f"{tmp_path}/copy/*.tar", tmp_path / "run"))
    assert again is not None and again.already_done


def test_the_page_shows_the_verdict_the_pictures_and_the_numbers(scenes, tmp_path):
    images, latents = scenes
    train = write(tmp_path / "shards", samples_of(images, latents))
    report, _, _ = fitted(scene_plan(train, tmp_path / "run"))
    page = report.page.read_text()
    assert "Basis for flux2: good" in page and "the VAE" not in page.split("<h2>")[0]
    for number in (report.r2, report.score.captured, report.score.explained):
        assert f"<b>{number:.3f}</b>" in page
    assert page.count("data:image/png") == 2 and page.count("<svg") == 2
    assert str(tmp_path) not in page and not re.search("https?://", page)

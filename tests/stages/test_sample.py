"""`sample` end to end on a tiny FLUX.2: real folders, real files, every refusal."""

import dataclasses
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from asymlift.artifacts.checkpoint import committing
from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.artifacts.files import sha256_file
from asymlift.artifacts.lifted_folder import KIND, read_lifted, write_lifted_facts
from asymlift.artifacts.manifest import digest_json, write_manifest
from asymlift.data.pictures import decode_image, encode_picture, image_to_float
from asymlift.errors import BadData, BadRecipe, CannotWrite, Unavailable
from asymlift.families import FAMILIES
from asymlift.families.references import with_references
from asymlift.maths.color import ColorCode
from asymlift.maths.patches import image_to_tokens, tokens_to_image
from asymlift.maths.schedule import tau_from_sigma
from asymlift.model.loading import load_transformer
from asymlift.model.painting import Canvas
from asymlift.model.pixel_flow import LatentFlow
from asymlift.model.sampling import SampleSettings, latent_noise, sample_latents
from asymlift.stages import sample as stage
from asymlift.stages.sample import SamplePlan, Sources, load_painter, sample
from asymlift.stages.sample_folder import GRID, INDEX
from tests import tiny

FAMILY = FAMILIES["flux2"]
COLOR = ColorCode("oklab", mean=(0.56, 0.0, 0.01), std=0.16)
S = 1.7
PROMPTS = ("a red disc", "two cats")
QUICK = SampleSettings(steps=3)
LORA = "transformer_blocks.0.ff.linear_in"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, what convert makes of it, and a checkpoint."""
    root = tmp_path_factory.mktemp("sample")
    net = tiny.tiny_transformer("flux2")
    base = tiny.write_pipeline(root / "base", "flux2", transformer=net)
    lifted = write_lifted(root / "lifted", base, net, S)
    facts = read_lifted(lifted).facts
    state = {
        "lora": {"rank": 2, "alpha": 4.0},
        "fingerprints": {"lifted": digest_json(facts)},
    }
    weights = load_file(lifted / "transformer" / "diffusion_pytorch_model.safetensors")
    with committing(root / "checkpoints", 250, state) as staged:
        for name, change in (("trainable", 0.3), ("ema", 0.1)):
            rows, columns = weights[f"{LORA}.weight"].shape
            trained = {
                "proj_out.weight": weights["proj_out.weight"] * (1 + change),
                f"{LORA}.lora_A.weight": torch.full((2, columns), change),
                f"{LORA}.lora_B.weight": torch.full((rows, 2), change),
            }
            save_file(trained, staged / f"{name}.safetensors")
    return {"base": base, "lifted": lifted, "checkpoint": root / "checkpoints" / "step-000250"}


def write_lifted(folder, base, net, s):
    geometry = tiny.tiny_geometry("flux2")
    A = tiny.random_basis(geometry)
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "transformer")
    # In float64, cast once, as convert does.
    doubled = type(net).from_config(net.config).double()
    doubled.load_state_dict(net.state_dict())
    tiny.lift(doubled, FAMILY, geometry, A).float().save_pretrained(folder / "transformer")
    write_lifted_facts(
        folder,
        family="flux2",
        networks=["transformer"],
        geometry=geometry,
        A=A.float(),
        s=s,
        color=COLOR,
        fingerprints={
            "base_transformer": DiffusersFolder(base).fingerprint("transformer"),
            "vae": DiffusersFolder(base).fingerprint("vae"),
            "basis": f"sha256:{s}",
        },
        more={},
    )
    write_manifest(folder, kind=KIND, facts={})
    return folder


@pytest.fixture
def plan(folders, tmp_path):
    return SamplePlan(
        out=tmp_path / "samples",
        prompts=PROMPTS,
        height=16,
        width=24,
        settings=QUICK,
        text_length=32,
        device="cpu",
        **folders,
    )


def change(plan, **changes):
    return dataclasses.replace(plan, **changes)


def read(plan):
    return {path.name: path.read_bytes() for path in sorted(plan.out.iterdir())}


def test_every_kind_of_weights_is_drawn_from_matched_noise_and_written_down(plan, folders):
    plan = change(plan, weights=("base", "lifted", "ema", "raw"), num_per_prompt=2)

    report = sample(plan)

    assert report.num_drawn == 16
    index = json.loads((plan.out / INDEX).read_bytes())
    assert index["complete"] is True
    assert index["facts"]["settings"]["guidance"] == 4.0
    assert index["facts"]["noise_levels"].startswith("3 from 0.99999")
    lifted = digest_json(read_lifted(folders["lifted"]).facts)
    assert index["facts"]["fingerprints"]["lifted model"] == lifted
    assert len(index["facts"]["fingerprints"]) == 4
    assert [entry["file"] for entry in index["pictures"]] == [
        f"{number:05d}-{weights}.png" for weights in plan.weights for number in range(4)
    ]
    for entry in index["pictures"]:
        image = decode_image((plan.out / entry["file"]).read_bytes())
        assert image.shape == (3, 16, 24)
        assert entry["sha256"] == sha256_file(plan.out / entry["file"])
    assert index["pictures"][3] == {
        "file": "00003-base.png",
        "weights": "base",
        "prompt": "two cats",
        "number": 1,
        "seed": 0,
        "sha256": index["pictures"][3]["sha256"],
    }
    assert len({entry["sha256"] for entry in index["pictures"]}) == 16
    grid = decode_image(report.grid.read_bytes())
    assert grid.shape[1] > 4 * 16 * 5  # four rows, each pixel shown five times
    assert grid.shape[2] > 4 * 24 * 5


def test_lifted_pictures_are_the_decoded_latents_seen_through_the_basis(plan):
    """With guidance too: Euler, on the base's own steps, colours not clamped on the way."""
    settings = SampleSettings("euler", 5, guidance=3.0, orthogonal=1.0, clamp=False, shift="base")
    plan = change(plan, settings=settings, weights=("lifted",), precision="float32")
    sources = Sources(plan)
    lifted, sigmas = sources.lifted, sources.noise_levels()
    canvas = Canvas(plan.height, plan.width, plan.seed, settings, sigmas)
    text = tiny.tiny_text("flux2", 2)
    null = tiny.tiny_text("flux2", 2, seed=9)

    drawn = load_painter(plan, sources, "lifted", canvas, torch.device("cpu"))(
        [0, 1], text, null, None
    )

    grid = canvas.grid(lifted.geometry)
    net = load_transformer(plan.base, FAMILY, dtype=torch.float32)
    z = sample_latents(
        LatentFlow(net, FAMILY, lifted.geometry),
        latent_noise(canvas.noise(lifted.geometry, [0, 1]), lifted.A),
        text,
        null,
        tau_from_sigma(sigmas, S),
        settings,
        grid,
    )
    low = COLOR.decode(tokens_to_image(S * z @ lifted.A.T, 8, grid)).clamp(-1, 1)
    assert low.std() > 0.1
    assert (drawn - low).abs().max() < 2e-4


@pytest.fixture
def references(tmp_path):
    """Two picture files of unlike sizes, neither a whole number of patches."""
    paths = tmp_path / "room.png", tmp_path / "chair.jpg"
    for path, size, kind in zip(paths, ((70, 101), (131, 66)), ("png", "jpeg"), strict=True):
        g = torch.Generator().manual_seed(size[0])
        image = torch.randint(0, 256, (3, *size), generator=g, dtype=torch.uint8)
        path.write_bytes(encode_picture(image, kind))
    return paths


def floats(path):
    return image_to_float(decode_image(path.read_bytes())).unsqueeze(0)


def middle(path):
    """A picture as the model is given it: 70 x 101 and 131 x 66, cut to patches of 8."""
    image = floats(path)
    return image[..., 3:67, 2:98] if image.shape[-1] == 101 else image[..., 1:129, 1:65]


@torch.no_grad()
def test_lifted_and_base_go_by_reference_pictures_each_in_its_own_way(plan, references):
    """The base by what its VAE makes of them, the lifted model by A^T x / s; guided too."""
    settings = SampleSettings("euler", 4, guidance=3.0, clamp=False, shift="base")
    plan = change(plan, settings=settings, references=references, precision="float32")
    sources = Sources(plan)
    lifted, taus = sources.lifted, tau_from_sigma(sources.noise_levels(), S)
    seen = tuple(image_to_float(one.image).unsqueeze(0) for one in sources.references)
    canvas = Canvas(16, 24, plan.seed, settings, sources.noise_levels(), seen)
    grid, vae = canvas.grid(lifted.geometry), tiny.tiny_vae("flux2")
    text, null = tiny.tiny_text("flux2", 2), tiny.tiny_text("flux2", 2, seed=9)
    flow = LatentFlow(
        load_transformer(plan.base, FAMILY, dtype=torch.float32), FAMILY, lifted.geometry
    )
    eps = latent_noise(canvas.noise(lifted.geometry, [0, 1]), lifted.A)

    def drawn(weights):
        paint = load_painter(plan, sources, weights, canvas, torch.device("cpu"))
        return paint([0, 1], text, null, None)

    def latents(maps):
        texts = [
            with_references(one, [z.expand(2, -1, -1, -1) for z in maps]) for one in (text, null)
        ]
        return sample_latents(flow, eps, *texts, taus, settings, grid)

    by_code = []
    for image in map(middle, references):
        tokens = image_to_tokens(COLOR.encode(image), 8) @ lifted.A / S
        by_code.append(tokens_to_image(tokens, 2, (image.shape[-2] // 8, image.shape[-1] // 8)))
    low = COLOR.decode(tokens_to_image(S * latents(by_code) @ lifted.A.T, 8, grid)).clamp(-1, 1)
    assert (drawn("lifted") - low).abs().max() < 2e-4

    by_vae = [FAMILY.encode_latents(vae, middle(path)) for path in references]
    image = FAMILY.decode_latents(vae, tokens_to_image(latents(by_vae), 2, grid))
    assert (drawn("base") - image).abs().max() < 2e-4

    alone = COLOR.decode(tokens_to_image(S * latents([]) @ lifted.A.T, 8, grid)).clamp(-1, 1)
    assert (low - alone).abs().max() > 0.05  # they do guide


def test_a_pipeline_that_reads_references_otherwise_is_refused_them_alone(
    plan, references, tmp_path
):
    base = shutil.copytree(plan.base, tmp_path / "kv")
    index = json.loads((base / "model_index.json").read_text())
    index["_class_name"] = "Flux2KleinKVPipeline"
    (base / "model_index.json").unlink()
    (base / "model_index.json").write_text(json.dumps(index))
    plan = change(plan, base=base, lifted=None, checkpoint=None, weights=("base",))
    with pytest.raises(BadRecipe, match=r"made for Flux2KleinKVPipeline.* at time 0, and keeps"):
        sample(change(plan, references=references))
    assert not plan.out.exists()
    assert sample(plan).num_drawn > 0


def test_all_weights_go_by_references_and_other_references_are_other_pictures(plan, references):
    plan = change(plan, weights=("base", "lifted", "ema", "raw"), references=references)
    assert sample(plan).num_drawn == 8
    assert sample(plan).num_drawn == 0  # and done is done
    index = json.loads((plan.out / INDEX).read_bytes())
    assert index["facts"]["references"] == [sha256_file(path) for path in references]
    assert index["paths"]["reference 2"] == str(references[1])

    alone = change(plan, references=(), out=plan.out.with_name("alone"))
    sample(alone)
    assert "references" not in json.loads((alone.out / INDEX).read_bytes())["facts"]
    for path in plan.out.glob("0*.png"):
        assert path.read_bytes() != (alone.out / path.name).read_bytes()

    for others in (references[:1], references[::-1], ()):
        with pytest.raises(CannotWrite, match="made with other references"):
            sample(change(plan, references=others))
    references[0].rename(references[0].with_name("elsewhere.png"))
    moved = (references[0].with_name("elsewhere.png"), references[1])
    assert sample(change(plan, references=moved)).num_drawn == 0  # the bytes count, not the name
    moved[0].write_bytes(references[1].read_bytes())
    with pytest.raises(CannotWrite, match="made with other references"):
        sample(change(plan, references=moved))


def small_picture(path):
    path.write_bytes(encode_picture(torch.zeros(3, 40, 90, dtype=torch.uint8), "png"))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda path: None, Unavailable, "there is no such file"),
        (lambda path: path.mkdir(), BadData, "cannot be read: Is a directory"),
        (os.mkfifo, BadData, "cannot be read: no regular file"),
        (lambda path: path.write_text("%!PS"), BadData, "not a JPEG, PNG or WebP image"),
        (lambda path: path.write_bytes(b""), BadData, "not a JPEG, PNG or WebP image"),
        (small_picture, BadData, "90 x 40 pixels; this model takes pictures of at least 64 pixels"),
    ],
)
def test_a_reference_that_cannot_be_used_is_named_before_anything_is_written(
    plan, tmp_path, references, make, kind, message
):
    path = tmp_path / "reference.png"
    make(path)
    with pytest.raises(kind, match=f"^reference picture {path}: {message}"):
        sample(change(plan, references=(references[0], path)))
    assert not plan.out.exists()


def test_a_reference_file_that_is_far_too_long_is_not_read(plan, references, monkeypatch):
    monkeypatch.setattr("asymlift.data.reference_picture.MOST_BYTES", 1000)
    with pytest.raises(BadData, match=r"room.png: cannot be read: it is longer than 1000 bytes"):
        sample(change(plan, references=references))


def test_references_are_turned_upright_and_their_alpha_lies_over_white(plan, tmp_path):
    """As every picture that enters asymlift, so not as the pipeline would take the file."""
    path, clear = tmp_path / "turned.jpg", tmp_path / "clear.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 70), "red").save(path, exif=exif)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(clear)
    upright, white = Sources(change(plan, references=(path, clear))).references
    assert upright.image.shape == (3, 96, 64)
    assert white.image.min() == 255


def test_a_family_that_takes_no_references_is_named(plan, tmp_path, references):
    base = tiny.write_pipeline(tmp_path / "sd3", "sd3")
    plan = change(plan, base=base, lifted=None, checkpoint=None, weights=("base",))
    with pytest.raises(BadRecipe, match="sd3 takes no reference pictures: asymlift knows of"):
        sample(change(plan, references=references))


def test_a_second_run_says_that_it_is_done(plan):
    sample(plan)
    before = {path: path.stat().st_mtime_ns for path in plan.out.iterdir()}

    report = sample(plan)

    assert report.num_drawn == 0
    assert len(report.pictures) == 2
    assert {path: path.stat().st_mtime_ns for path in plan.out.iterdir()} == before


def test_pictures_are_the_same_in_batches_of_one_and_of_three(plan):
    """Up to the last of 256 levels: matrix products of other shapes round otherwise."""
    several = change(plan, num_per_prompt=3, prompts=PROMPTS[:1], weights=("base", "ema"))
    apart = change(several, batch=1, out=plan.out.with_name("apart"))
    together = change(several, batch=3, out=plan.out.with_name("together"))
    sample(apart)
    sample(together)
    for path in sorted(apart.out.glob("*.png")):
        if path.name != GRID:
            one, other = (decode_image(f.read_bytes()) for f in (path, together.out / path.name))
            assert (one.int() - other.int()).abs().max() <= 1


def test_a_picture_does_not_depend_on_the_other_prompts(plan):
    sample(plan)
    alone = change(plan, prompts=PROMPTS[1:], out=plan.out.with_name("alone"), batch=1)
    sample(alone)
    one, other = (
        image_to_float(decode_image((folder / name).read_bytes()))
        for folder, name in ((plan.out, "00001-ema.png"), (alone.out, "00000-ema.png"))
    )
    assert (one - other).abs().max() <= 1 / 127


def test_only_what_is_missing_or_damaged_is_drawn_again(plan):
    plan = change(plan, batch=1)
    sample(plan)
    whole = read(plan)
    (plan.out / "00000-ema.png").unlink()
    assert sample(plan).num_drawn == 1
    (plan.out / "00001-ema.png").write_bytes(b"half a pict")
    assert sample(plan).num_drawn == 1
    assert read(plan) == whole


def test_a_killed_run_is_taken_up_where_it_stopped(plan, monkeypatch):
    plan = change(plan, batch=1, weights=("lifted", "ema"))
    whole = change(plan, out=plan.out.with_name("whole"))
    sample(whole)
    real, saved = stage.save, []

    def save_some(plan, picture, image):
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append(picture)
        real(plan, picture, image)

    monkeypatch.setattr(stage, "save", save_some)
    with pytest.raises(KeyboardInterrupt):
        sample(plan)
    monkeypatch.setattr(stage, "save", real)

    assert sample(plan).num_drawn == 3
    assert read(plan) == read(whole)


def test_pictures_of_another_plan_are_not_mixed_or_replaced_unasked(plan):
    sample(plan)
    other = change(plan, seed=1, prompts=PROMPTS[:1])
    with pytest.raises(CannotWrite) as refused:
        sample(other)
    assert "made with other prompts, seed." in str(refused.value)
    assert "--overwrite" in str(refused.value)

    sample(change(other, overwrite=True))
    assert sorted(read(plan)) == ["00000-ema.png", INDEX]


def test_pictures_from_elsewhere_are_not_replaced_unasked(plan):
    plan.out.mkdir()
    (plan.out / "holiday.png").write_bytes(b"precious")
    (plan.out / "00000-ema.png").write_bytes(b"precious")
    with pytest.raises(CannotWrite, match=r"pictures and no index.json"):
        sample(plan)
    sample(change(plan, overwrite=True))
    assert (plan.out / "holiday.png").read_bytes() == b"precious"


def test_a_damaged_index_is_named(plan):
    sample(plan)
    for content in ("{", "[]", '{"facts": {}, "pictures": [1], "complete": true}'):
        (plan.out / INDEX).write_text(content)
        with pytest.raises(BadData, match=r"index.json: damaged"):
            sample(plan)
    assert sample(change(plan, overwrite=True)).num_drawn == 2


def test_the_base_alone_samples_on_its_own_levels(plan):
    report = sample(change(plan, lifted=None, checkpoint=None, weights=("base",)))
    assert report.num_drawn == 2
    shift = FAMILY.base_shift({"use_dynamic_shifting": True}, 6)
    last = shift / (shift + 2)  # 3 steps
    assert report.noise_levels.endswith(f"the last {last:.4f}")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"height": 20}, BadRecipe, "height 20: this model's patches are 8 pixels wide"),
        ({"height": 20}, BadRecipe, "the nearest is 16"),
        ({"width": 23}, BadRecipe, "width 23: .*the nearest is 24"),
        ({"width": 3}, BadRecipe, "the nearest is 8"),
        ({"prompts": ()}, BadRecipe, "no prompts"),
        ({"lifted": None}, Unavailable, "weights ema: not there; run `asymlift convert` first"),
        ({"checkpoint": None}, Unavailable, "weights ema: not there; run `asymlift finetune`"),
        ({"base": None, "weights": ("base",)}, Unavailable, "weights base: not there; give"),
        (
            {"settings": SampleSettings("euler", 40, shift=0.1, floor=0.01)},
            BadRecipe,
            "40 steps at shift 0.1 end on noise level 2.6e-03, below the floor 0.01",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(plan, changes, kind, message):
    with pytest.raises(kind, match=message):
        sample(change(plan, **changes))
    assert not plan.out.exists()


def test_a_run_without_an_average_is_told_what_it_has(plan, tmp_path):
    with committing(tmp_path, 5, {"lora": None, "fingerprints": {}}) as staged:
        save_file({"proj_out.weight": torch.zeros(192, 32)}, staged / "trainable.safetensors")
    plan = change(plan, checkpoint=tmp_path / "step-000005")
    with pytest.raises(Unavailable, match="--weights raw"):
        sample(plan)
    assert sample(change(plan, weights=("raw",))).num_drawn == 2


@pytest.mark.parametrize("name", ["ema.safetensors", "state.json"])
def test_a_checkpoint_with_a_changed_byte_is_refused(plan, tmp_path, name):
    step = tmp_path / "step-000250"
    shutil.copytree(plan.checkpoint, step)
    data = bytearray((step / name).read_bytes())
    data[-1] ^= 1
    (step / name).write_bytes(data)
    with pytest.raises(BadData, match=f"{name}: missing, or its bytes have changed"):
        sample(change(plan, checkpoint=step))
    if name == "ema.safetensors":
        assert sample(change(plan, checkpoint=step, weights=("raw",))).num_drawn == 2


def test_a_folder_that_is_no_checkpoint_is_refused(plan):
    with pytest.raises(BadData, match="a lifted, not a checkpoint"):
        sample(change(plan, checkpoint=plan.lifted))


def test_another_base_than_the_one_that_was_lifted_is_refused(plan, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(plan.base, other)
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.weight"][0, 0] += 1
    save_file(tensors, weights)
    with pytest.raises(BadData) as refused:
        sample(change(plan, base=other, weights=("base", "lifted")))
    assert "lifted: lifted from another base than the one given" in str(refused.value)
    assert str(refused.value).count("sha256:") == 2


def test_a_checkpoint_of_another_lifted_model_is_refused(plan, tmp_path):
    net = tiny.tiny_transformer("flux2")
    other = write_lifted(tmp_path / "lifted", plan.base, net, 2.0)
    with pytest.raises(BadData, match="trained from another lifted model than the one given"):
        sample(change(plan, lifted=other))


def test_weights_that_are_not_finite_are_named_and_nothing_is_drawn(plan, tmp_path):
    with committing(tmp_path, 5, {"lora": None}) as staged:
        broken = {"proj_out.weight": torch.full((192, 32), torch.nan)}
        save_file(broken, staged / "trainable.safetensors")
    plan = change(plan, checkpoint=tmp_path / "step-000005", weights=("raw",))
    with pytest.raises(BadData, match="the network answers with NaN or infinity at noise level 1"):
        sample(plan)
    assert not list(plan.out.glob("*.png"))


def test_a_vae_that_is_not_finite_is_named(plan, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(plan.base, base)
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"][:] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(BadData, match="lifted from another base VAE than the one given"):
        sample(change(plan, base=base, weights=("base",)))
    alone = change(plan, base=base, weights=("base",), lifted=None)
    with pytest.raises(BadData, match=r"00000-base\.png: the VAE's picture holds NaN"):
        sample(alone)


RANK = """
import sys, pickle
from asymlift.stages.sample import sample
plan = pickle.loads(bytes.fromhex(sys.argv[1]))
print(sample(plan).num_drawn)
"""


@pytest.mark.slow
def test_two_ranks_share_the_pictures_and_write_one_index(plan, free_port):
    alone = change(plan, batch=1, num_per_prompt=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: the number of threads changes the last bit of a sum
    sample(alone)
    torch.set_num_threads(threads)
    shared = change(alone, out=plan.out.with_name("shared"))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, pickle.dumps(shared).hex()],
            env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in "01"
    ]
    assert [int(rank.communicate(timeout=120)[0]) for rank in ranks] == [4, 4]
    assert read(shared) == read(alone)


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

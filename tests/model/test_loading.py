"""A diffusers folder comes back bit for bit, or is refused by the name of what is wrong."""

import copy
import json
import math
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from asymlift.artifacts.diffusers_folder import DiffusersFolder
from asymlift.errors import BadData, Unavailable
from asymlift.families import FAMILIES
from asymlift.model import loading
from asymlift.model.loading import (
    embed_prompts,
    keep_float32,
    load_pipeline,
    load_pipeline_parts,
    load_transformer,
    text_parts,
    weightless_transformer,
)
from asymlift.runtime import third_party
from tests.families.case import case_of
from tests.tiny import KINDS, lifted_pair, tiny_pipeline, tiny_transformer, write_pipeline

FLUX2 = FAMILIES["flux2"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A FLUX.2 transformer as save_pretrained writes it."""
    tiny_transformer("flux2").save_pretrained(tmp_path / "transformer")
    return tmp_path


# -- what comes back


@pytest.mark.parametrize("shard", ["10GB", "60KB"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_transformer_comes_back_bit_for_bit(name, shard, tmp_path):
    """Single or sharded; the tables that are no weights too, or the outputs would differ."""
    pair = lifted_pair(name, dtype=torch.float32)
    saved = pair.pixel.net
    saved.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    num_files = len(list((tmp_path / "transformer").glob("*.safetensors")))
    assert (num_files == 1) == (shard == "10GB")

    loaded = load_transformer(tmp_path, FAMILIES[name])

    assert type(loaded) is type(saved) and not loaded.training
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for key, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert all(p.requires_grad for p in loaded.parameters())
    x_t = torch.randn(2, math.prod(pair.grid), pair.geometry.D)
    sigma = torch.tensor([0.3, 0.8])
    wanted = pair.pixel(x_t, sigma, pair.text, pair.grid, floor=1e-6)
    # A copy: a product with a single row is rounded by where in a mapped file its weights lie.
    pair.pixel.net = copy.deepcopy(loaded)
    assert torch.equal(pair.pixel(x_t, sigma, pair.text, pair.grid, floor=1e-6), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_each_tensor_keeps_its_stored_dtype(name, tmp_path):
    """A lifted checkpoint: float32 maps around a bf16 trunk."""
    family, net = FAMILIES[name], tiny_transformer(name).to(torch.bfloat16)
    keep_float32(net)
    for path in (family.first, family.last):
        net.get_submodule(path).float()
    net.save_pretrained(tmp_path / "transformer")
    loaded = load_transformer(tmp_path, family)
    assert {k: t.dtype for k, t in loaded.state_dict().items()} == {
        k: t.dtype for k, t in net.state_dict().items()
    }
    assert len({t.dtype for t in loaded.state_dict().values()}) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dtype_can_be_asked_for(folder, dtype):
    loaded = load_transformer(folder, FLUX2, dtype=dtype)
    assert {t.dtype for t in loaded.state_dict().values()} == {dtype}


def test_loading_draws_no_random_number_and_leaves_torch_as_it_was(folder):
    state = torch.get_rng_state()
    load_transformer(folder, FLUX2)
    assert torch.equal(torch.get_rng_state(), state)
    layer = torch.nn.Linear(50, 50)
    assert layer.weight.std() > 0.05  # initialised again


def test_weights_are_mapped_from_the_file_not_copied(folder):
    """Loading must not take the memory of a second model; untouched pages take none at all."""
    big = folder / "big"
    net = tiny_transformer("flux2", joint_attention_dim=2**19)  # a 64 MiB layer
    net.save_pretrained(big / "transformer")
    del net

    def anonymous_mib() -> float:
        (line,) = [
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssAnon")
        ]
        return int(line.split()[1]) / 1024

    before = anonymous_mib()
    loaded = load_transformer(big, FLUX2)
    assert anonymous_mib() - before < 16
    assert loaded.context_embedder.weight.shape[1] == 2**19


# -- what is refused


def test_a_missing_folder_is_named_and_the_network_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadData, match="some-org/some-model: no such folder"):
        load_transformer("some-org/some-model", FLUX2)
    with pytest.raises(BadData, match="some-org/some-model: no such folder"):
        load_pipeline("some-org/some-model")
    with pytest.raises(BadData, match="transformer: no such folder"):
        load_transformer(tmp_path, FLUX2)


def test_a_broken_config_is_named(folder):
    config = folder / "transformer" / "config.json"
    config.write_text("{")
    with pytest.raises(BadData, match=r"config\.json: not JSON"):
        load_transformer(folder, FLUX2)
    config.write_text("[]")
    with pytest.raises(BadData, match=r"config\.json: holds list, not a JSON object"):
        load_transformer(folder, FLUX2)
    config.unlink()
    with pytest.raises(
        BadData, match=r"config\.json: there is no such file; is .*transformer whole"
    ):
        load_transformer(folder, FLUX2)


def test_another_class_is_refused(folder):
    with pytest.raises(BadData, match=r"holds a Flux2Tr.*but family sd3 is a SD3Tr"):
        load_transformer(folder, FAMILIES["sd3"])


def state_config(folder: Path, **changes: object) -> Path:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": "x"},
        {"mlp_ratio": "x"},
        {"num_layers": []},
        {"attention_head_dim": 0},
        {"in_channels": -1},
        {"num_attention_heads": 2**40},
    ],
)
def test_a_config_that_no_network_can_be_built_by_is_named(folder, changes):
    path = state_config(folder, **changes)
    with pytest.raises(BadData) as refused:
        load_transformer(folder, FLUX2)
    assert f"{path}: no Flux2Transformer2DModel can be built by it: " in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_network_without_end_is_refused_before_it_fills_memory(folder, monkeypatch):
    monkeypatch.setattr(loading, "MOST_PARAMETERS", 400)
    path = state_config(folder, num_layers=10**9)
    wanted = rf"{path}: no Flux2T.*: it asks for more than 400 tensors"
    with pytest.raises(BadData, match=wanted):
        load_transformer(folder, FLUX2)
    with pytest.raises(BadData, match=wanted):
        weightless_transformer(
            json.loads(path.read_text()), FLUX2, lambda name: torch.float32, path
        )
    torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(400)))  # elsewhere nothing counts


def test_weights_that_do_not_fit_are_named(folder):
    path = folder / "transformer" / WEIGHTS
    weights = load_file(path)
    weights["extra.weight"] = torch.zeros(1)
    weights["proj_out.weight"] = torch.zeros(3, 32)
    del weights["x_embedder.weight"]
    save_file(weights, path)
    with pytest.raises(BadData, match=r"missing: x_embedder\.weight; unexpected: extra\.weight; "
                       r"wrong shape: proj_out\.weight is \[3, 32\], not \[16, 32\]"):  # fmt: skip
        load_transformer(folder, FLUX2)


def test_many_missing_weights_are_counted(folder):
    path = folder / "transformer" / WEIGHTS
    save_file({"x_embedder.weight": torch.zeros(32, 16)}, path)
    with pytest.raises(BadData, match=r"missing: context_embedder\.weight, .* and \d+ more"):
        load_transformer(folder, FLUX2)


def test_a_truncated_file_is_named(folder):
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadData, match=rf"{WEIGHTS}: \d+ bytes long, .* cut short or damaged"):
        load_transformer(folder, FLUX2)


def test_pickled_weights_are_refused(folder):
    (folder / "transformer" / WEIGHTS).rename(folder / "transformer" / "model.bin")
    with pytest.raises(BadData, match=r"model\.bin: a pickle, which can run code"):
        load_transformer(folder, FLUX2)


def test_no_weights_and_weights_of_another_name_are_told_apart(folder):
    path = folder / "transformer" / WEIGHTS
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(BadData, match=r"It holds: .*, diffusion_pytorch_model\.fp16\.safetensors"):
        load_transformer(folder, FLUX2)
    path.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(BadData, match="no weights"):
        load_transformer(folder, FLUX2)


def sharded(folder: Path) -> tuple[Path, dict]:
    shutil.rmtree(folder / "transformer")
    tiny_transformer("flux2").save_pretrained(folder / "transformer", max_shard_size="60KB")
    index = folder / "transformer" / f"{WEIGHTS}.index.json"
    return index, json.loads(index.read_text())


def test_a_missing_shard_is_named(folder):
    index, content = sharded(folder)
    name = content["weight_map"]["proj_out.weight"]
    (index.parent / name).unlink()
    with pytest.raises(BadData, match=rf"{name} is missing, .*index\.json names it"):
        load_transformer(folder, FLUX2)


def test_an_index_that_promises_too_much_is_refused(folder):
    index, content = sharded(folder)
    first, *_, last = sorted(set(content["weight_map"].values()))
    content["weight_map"]["proj_out.weight"] = (
        last if content["weight_map"]["proj_out.weight"] == first else first
    )
    index.write_text(json.dumps(content))
    with pytest.raises(BadData, match=r"says that proj_out\.weight is in .*, but it is in"):
        load_transformer(folder, FLUX2)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", 3])
def test_an_index_cannot_point_outside_its_folder(folder, name):
    index, content = sharded(folder)
    content["weight_map"]["proj_out.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(BadData, match="is no plain file name"):
        load_transformer(folder, FLUX2)


def test_an_index_without_a_map_is_refused(folder):
    index, _ = sharded(folder)
    index.write_text("{}")
    with pytest.raises(BadData, match="no weight_map"):
        load_transformer(folder, FLUX2)


# -- the rest of a pipeline


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_comes_back_without_its_transformer(name, tmp_path):
    family, saved = FAMILIES[name], tiny_pipeline(name)
    write_pipeline(tmp_path, name)

    loaded = load_pipeline(tmp_path)

    assert type(loaded) is type(saved) and loaded.transformer is None
    assert not loaded.vae.training
    for part in (part for part in loaded.components if part.startswith("text_encoder")):
        assert not getattr(loaded, part).training
        setattr(loaded, part, copy.deepcopy(getattr(loaded, part)))  # see above: a single row
    for pair in zip(
        family.encode_prompt(saved, ["a bee", ""], 12),
        family.encode_prompt(loaded, ["a bee", ""], 12),
        strict=True,
    ):
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])
    image = torch.randn(1, 3, case_of(name).height, case_of(name).width).clamp(-1, 1)
    with torch.no_grad():
        z = family.encode_latents(loaded.vae, image)
        assert torch.equal(z, family.encode_latents(saved.vae, image))
        assert torch.equal(
            family.decode_latents(loaded.vae, z), family.decode_latents(saved.vae, z)
        )
    assert loaded.scheduler.config.shift == saved.scheduler.config.shift


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_encoded_by_the_parts_for_text_alone(name, tmp_path):
    family, saved = FAMILIES[name], tiny_pipeline(name)
    folder = DiffusersFolder(write_pipeline(tmp_path, name))
    parts = text_parts(folder, family)
    assert parts.isdisjoint({"transformer"} if family.text_needs_vae else {"transformer", "vae"})
    pipeline = load_pipeline(folder.path, parts)
    (alone,), (whole,) = (family.encode_prompt(p, ["a bee"], 12) for p in (pipeline, saved))
    assert alone.keys() == whole.keys()
    for key, tensor in whole.items():
        assert_close(alone[key], tensor)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("whole"), "zimage")


def test_only_what_is_named_is_loaded(whole):
    parts = load_pipeline_parts(whole, ["vae", "scheduler"], dtype=torch.bfloat16)
    assert set(parts) == {"vae", "scheduler"} and parts["vae"].dtype == torch.bfloat16
    pipeline = load_pipeline(whole, ["vae"])
    assert pipeline.text_encoder is None and pipeline.vae.dtype == torch.float32


def test_a_text_encoder_takes_the_dtype_asked_for(whole):
    parts = load_pipeline_parts(whole, ["text_encoder"], dtype=torch.bfloat16)
    assert parts["text_encoder"].dtype == torch.bfloat16


def test_latents_of_a_bf16_vae_are_float32(whole):
    vae = load_pipeline_parts(whole, ["vae"], dtype=torch.bfloat16)["vae"]
    with torch.no_grad():
        assert (
            FAMILIES["zimage"].encode_latents(vae, torch.zeros(1, 3, 8, 8)).dtype == torch.float32
        )


def changed(whole: Path, tmp_path: Path, name: str, entry: object) -> Path:
    """A copy whose model_index.json says something else about one component."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {name: entry}))
    return copy


def test_an_unknown_component_lists_the_known_ones(whole):
    with pytest.raises(BadData, match=r"no component 'vea'; it has scheduler, text_encoder, .*vae"):
        load_pipeline_parts(whole, ["vea"])


def test_a_component_listed_as_null_is_none(whole, tmp_path):
    copy = changed(whole, tmp_path, "vae", [None, None])
    assert load_pipeline_parts(copy, ["vae"]) == {"vae": None}


def test_code_that_came_with_the_checkpoint_is_not_run(whole, tmp_path):
    copy = changed(whole, tmp_path, "vae", ["my_vae", "MyVAE"])
    with pytest.raises(BadData, match="needs code from 'my_vae'; only classes of diffusers and"):
        load_pipeline_parts(copy, ["vae"])


@pytest.mark.parametrize(
    "entry, said",
    [
        (["transformers", "pipeline"], r"transformers\.pipeline is a function, not a class"),
        (["transformers", "utils"], r"transformers\.utils is a .*odule, not a class"),
        (["diffusers", {"a": 1}], r"names a class {'a': 1}, which is no text"),
        (["transformers", {"a": 1}], r"names a class {'a': 1}, which is no text"),
        (["transformers", "AutoModel"], r"is a transformers\.AutoModel, which no part of a p"),
        (["diffusers", "DiffusionPipeline"], r"is a diffusers\.DiffusionPipeline, which no part"),
    ],
)
def test_a_component_is_a_model_a_reader_or_a_scheduler(whole, tmp_path, entry, said):
    """Other classes look for code by themselves, or read pickles."""
    copy = changed(whole, tmp_path, "vae", entry)
    with pytest.raises(BadData, match=rf"model_index\.json: .*{said}"):
        load_pipeline_parts(copy, ["vae"])


@pytest.mark.parametrize(
    "entry, said",
    [
        ("utils", r"diffusers\.utils is a .*odule, not a class"),
        ("AutoencoderKL", "AutoencoderKL is no pipeline"),
        (["evil", "Evil"], r"names a class \['evil', 'Evil'\], which is no text"),
        ("SanaPipeline", r"no SanaPipeline can be made of it: .*"),
    ],
)
def test_the_pipeline_has_to_be_one_that_takes_these_parts(whole, tmp_path, entry, said):
    copy = changed(whole, tmp_path, "_class_name", entry)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"steps": 4}))
    with pytest.raises(BadData, match=rf"model_index\.json: {said}"):
        load_pipeline(copy, ["scheduler"])


@pytest.mark.parametrize(
    "part, change, said",
    [
        ("vae", {"block_out_channels": "8", "latent_channels": "x"}, ""),
        ("vae", {"layers_per_block": 200}, "it asks for more than 400 tensors"),
        ("text_encoder", {"hidden_size": "x"}, ""),
        ("text_encoder", {"num_hidden_layers": 300}, "must be equal to the number of `layer_t"),
        ("scheduler", {"num_train_timesteps": "x"}, ""),
    ],
)
def test_a_part_that_cannot_be_built_is_named(whole, tmp_path, monkeypatch, part, change, said):
    monkeypatch.setattr(loading, "MOST_PARAMETERS", 400)
    copy = changed(whole, tmp_path, "unused", None)
    (path,) = (p for p in (copy / part).glob("*config.json") if "generation" not in p.name)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadData, match=rf"{part}: cannot be loaded as .*{said}") as refused:
        load_pipeline_parts(copy, [part])
    assert len(str(refused.value).splitlines()) == 1


def test_layers_without_end_are_refused_before_they_are_named(whole, tmp_path):
    copy = changed(whole, tmp_path, "unused", None)
    path = copy / "text_encoder" / "config.json"
    config = json.loads(path.read_text()) | {"deep": {"num_hidden_layers": 10**9}}
    path.write_text(json.dumps(config))
    with pytest.raises(BadData, match=rf"{path}: `num_hidden_layers` is 1000000000; no network"):
        load_pipeline_parts(copy, ["text_encoder"])


def test_a_package_that_a_part_needs_is_unavailable(whole, monkeypatch):
    def lacking(*args, **kwargs):
        raise ImportError("sentencepiece is not installed")

    diffusers = third_party.library("diffusers")
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", lacking)
    with pytest.raises(Unavailable, match=r"vae needs a package that is not .*: sentencepiece is"):
        load_pipeline_parts(whole, ["vae"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__ }}",
        "{% if",
        "{{ a.b.c }}",
        "{{ 1 // messages[1:] | length }}",
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_with_its_folder(whole, tmp_path, template):
    """The sandbox that it is filled in lets nothing run."""
    copy = changed(whole, tmp_path, "_name_or_path", "")
    (copy / "tokenizer" / "chat_template.jinja").write_text(template)
    pipeline = load_pipeline(copy)
    with pytest.raises(BadData, match=r"copy/tokenizer: its chat template: .+"):
        embed_prompts(FAMILIES["zimage"], pipeline, ["a bee"], 12)


@pytest.mark.parametrize("name", ["../vae", "/vae", "vae/.."])
def test_a_component_cannot_lie_outside_its_folder(whole, tmp_path, name):
    copy = changed(whole, tmp_path, name, ["diffusers", "AutoencoderKL"])
    with pytest.raises(BadData, match=rf"names a component '{name}', which is no plain folder"):
        load_pipeline_parts(copy, [name])


def test_a_class_of_another_version_is_unavailable(whole, tmp_path):
    copy = changed(whole, tmp_path, "vae", ["diffusers", "AutoencoderOfTomorrow"])
    with pytest.raises(Unavailable, match=r"AutoencoderOfTomorrow, which diffusers \d.* does not"):
        load_pipeline_parts(copy, ["vae"])


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_component_without_some_of_its_weights_is_refused(whole, tmp_path, part):
    """The libraries would fill them with noise and say so in a log line."""
    copy = changed(whole, tmp_path, "unused", None)
    (path,) = (copy / part).glob("*.safetensors")
    weights = load_file(path)
    weights.pop(next(name for name in weights if "norm" in name))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BadData, match=rf"{part}: .*(missing|norm)"):
        load_pipeline_parts(copy, [part])


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_component_without_files_is_refused(whole, tmp_path, part):
    copy = changed(whole, tmp_path, "unused", None)
    for path in (copy / part).iterdir():
        path.unlink()
    with pytest.raises(BadData, match=part):
        load_pipeline_parts(copy, [part])
    (copy / part).rmdir()
    with pytest.raises(BadData, match=rf"there is no {part}/ in this pipeline folder"):
        load_pipeline_parts(copy, [part])


@pytest.mark.parametrize("suffix", [".bin", ".pkl", ".pickle"])
def test_a_pickled_component_is_refused(whole, tmp_path, suffix):
    copy = changed(whole, tmp_path, "unused", None)
    (path,) = (copy / "vae").glob("*.safetensors")
    path = path.rename(path.with_suffix(suffix))
    with pytest.raises(BadData, match=rf"{path.name}: a pickle"):
        load_pipeline_parts(copy, ["vae"])

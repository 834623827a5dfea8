"""A pipeline folder is read as JSON and safetensors; what does not fit together is named."""

import json
import os
import shutil
import threading
from contextlib import suppress

import pytest

from asymlift.artifacts import diffusers_folder
from asymlift.artifacts.diffusers_folder import DiffusersFolder, is_plain_name
from asymlift.artifacts.files import sha256_file
from asymlift.artifacts.manifest import read_manifest
from asymlift.artifacts.parsing import MOST_JSON
from asymlift.errors import BadData
from asymlift.stages.convert import convert
from tests.reliability.fake_pipeline import fake_plan, transformer_tensors, write_base, write_json

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


def test_it_knows_its_parts(base):
    folder = DiffusersFolder(base)
    assert folder.components["transformer"] == "Flux2Transformer2DModel"
    assert folder.config("scheduler") == {"shift": 3.0}
    assert folder.config("vae")["latent_channels"] == 2
    assert [path.name[24:29] for path in folder.weight_files("transformer")] == [
        "00001",
        "00002",
        "00003",
    ]
    names = {name for header in folder.headers("transformer").values() for name in header.tensors}
    assert names == transformer_tensors(0).keys()
    assert folder.license == "other, a-license"


def test_a_fingerprint_follows_weights_and_config_but_not_what_saving_changes(base):
    fingerprint = DiffusersFolder(base).fingerprint("vae")
    assert fingerprint.startswith("sha256:")

    config = json.loads((base / "vae/config.json").read_text())
    write_json(base / "vae/config.json", config | {"_diffusers_version": "9.9"})
    assert DiffusersFolder(base).fingerprint("vae") == fingerprint

    write_json(base / "vae/config.json", config | {"scaling_factor": 0.5})
    assert DiffusersFolder(base).fingerprint("vae") != fingerprint

    write_json(base / "vae/config.json", config)
    weights = base / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert DiffusersFolder(base).fingerprint("vae") != fingerprint


def add_tokenizer(base):
    write_json(base / "tokenizer/sub/tokenizer.json", {"vocab": ["a", "b"]})
    (base / "tokenizer/.cache").write_text("of a download")
    index = json.loads((base / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "Qwen2Tokenizer"]
    write_json(base / "model_index.json", index)


def test_the_fingerprint_of_text_follows_encoders_and_tokenizers_alone(base):
    add_tokenizer(base)
    fingerprint = DiffusersFolder(base).text_fingerprint()
    assert fingerprint.startswith("sha256:")

    weights = base / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    write_json(base / "scheduler/scheduler_config.json", {"shift": 7.0})
    assert DiffusersFolder(base).text_fingerprint() == fingerprint

    for changed in ("text_encoder/model.safetensors", "tokenizer/sub/tokenizer.json"):
        data = (base / changed).read_bytes()
        (base / changed).write_bytes(data[:-1] + b" ")
        assert DiffusersFolder(base).text_fingerprint() != fingerprint
        (base / changed).write_bytes(data)
    write_json(base / "tokenizer/added_tokens.json", {"c": 2})
    assert DiffusersFolder(base).text_fingerprint() != fingerprint


def test_a_lifted_folder_has_the_fingerprint_of_text_that_its_base_has(tmp_path):
    plan = fake_plan(tmp_path)
    add_tokenizer(plan.base)
    convert(plan)

    lifted, base = DiffusersFolder(plan.output), DiffusersFolder(plan.base)

    assert (lifted.path / "tokenizer/sub/tokenizer.json").is_file()
    assert lifted.text_fingerprint() == base.text_fingerprint()
    assert lifted.fingerprint("vae") == base.fingerprint("vae")


def test_what_a_manifest_states_is_not_read_again_unless_the_size_differs(tmp_path, monkeypatch):
    plan = fake_plan(tmp_path)
    add_tokenizer(plan.base)
    convert(plan)
    vae, text = (f(DiffusersFolder(plan.base)) for f in FINGERPRINTS)
    files, read = read_manifest(plan.output).files, []
    monkeypatch.setattr(
        diffusers_folder, "sha256_file", lambda path: read.append(path.name) or sha256_file(path)
    )
    assert [f(DiffusersFolder(plan.output, files)) for f in FINGERPRINTS] == [vae, text]
    assert read == []

    weights = plan.output / "vae/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.write_bytes((plan.base / "vae" / weights.name).read_bytes() + b"x")
    assert DiffusersFolder(plan.output, files).fingerprint("vae") != vae
    assert read == [weights.name]


FINGERPRINTS = (lambda folder: folder.fingerprint("vae"), DiffusersFolder.text_fingerprint)


def test_a_model_without_text_encoders_has_no_fingerprint_of_text(base):
    index = json.loads((base / "model_index.json").read_text())
    write_json(base / "model_index.json", index | {"text_encoder": [None, None]})
    assert DiffusersFolder(base).text_fingerprint() is None


def test_hashing_that_fails_is_raised_where_its_result_is_needed(base, monkeypatch):
    """Whatever it was: nobody waits for a result that will not come."""
    folder, path = DiffusersFolder(base), base / "model_index.json"

    def fail(path):
        raise MemoryError

    monkeypatch.setattr(diffusers_folder, "sha256_file", fail)
    with folder.hashing_ahead([path]), pytest.raises(MemoryError):
        result_of(folder, path)
    (base / "README.md").unlink()
    monkeypatch.undo()
    with pytest.raises(BadData, match=r"README\.md: cannot be read \(No such file"):
        result_of(folder, base / "README.md")


def test_what_was_not_hashed_ahead_is_hashed_when_it_is_needed(base, monkeypatch):
    """A conversion that fails cancels what is waiting."""
    paths = [path for path in sorted(base.rglob("*")) if path.is_file()]
    folder, go_on = DiffusersFolder(base), threading.Event()

    def slow(path):
        go_on.wait(10)
        return sha256_file(path)

    monkeypatch.setattr(diffusers_folder, "sha256_file", slow)
    monkeypatch.setattr(diffusers_folder.os, "cpu_count", lambda: 1)
    later = threading.Timer(0.1, go_on.set)
    with pytest.raises(ZeroDivisionError), folder.hashing_ahead(paths):
        later.start()
        raise ZeroDivisionError
    assert [result_of(folder, path) for path in paths] == [sha256_file(path) for path in paths]


def result_of(folder, path):
    """The digest, or a failure where it would never come."""

    def wait():
        with suppress(BaseException):  # raised again below
            folder.sha256(path)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "waits for ever"
    return folder.sha256(path)


def test_what_is_no_pipeline_folder_is_refused(base, tmp_path):
    with pytest.raises(BadData, match="no such folder"):
        DiffusersFolder(tmp_path / "nowhere")
    with pytest.raises(BadData, match=r"no model_index\.json"):
        DiffusersFolder(tmp_path)
    shutil.rmtree(base / "vae")
    with pytest.raises(BadData, match="no vae/ in this"):
        DiffusersFolder(base).config("vae")
    (base / "scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(BadData, match=r"scheduler_config\.json: not JSON"):
        DiffusersFolder(base).config("scheduler")
    (base / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(BadData, match=r"no config\.json"):
        DiffusersFolder(base).config("scheduler")


def change_index(base, **weight_map):
    path = base / "transformer" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    write_json(path, index)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/x.safetensors", "a/b", "", 7])
def test_an_index_cannot_lead_out_of_its_folder(name, base):
    change_index(base, **{"proj_out.weight": name})
    with pytest.raises(BadData, match=r"proj_out\.weight is said to be in .*no plain file name"):
        DiffusersFolder(base).weight_files("transformer")


@pytest.mark.parametrize("name", ["../../escaped", "/etc", "a/b", "", ".hidden"])
def test_a_component_cannot_lie_outside_its_folder(name, base):
    index = json.loads((base / "model_index.json").read_text())
    write_json(base / "model_index.json", index | {name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(
        BadData, match=r"model_index\.json: names a component .*no plain folder name"
    ):
        _ = DiffusersFolder(base).components


def test_an_index_of_pickles_is_refused(base):
    change_index(base, **{"proj_out.weight": "pytorch_model.bin"})
    with pytest.raises(BadData, match="only safetensors are read"):
        DiffusersFolder(base).weight_files("transformer")


def test_an_index_and_its_shards_must_agree(base):
    folder = base / "transformer"
    shards = DiffusersFolder(base).weight_files("transformer")
    change_index(base, **{"proj_out.weight": shards[0].name})
    with pytest.raises(BadData, match=r"says that proj_out\.weight is in .*00001.* but it is in"):
        DiffusersFolder(base).headers("transformer")
    change_index(base, **{"proj_out.weight": shards[2].name, "extra": shards[2].name})
    with pytest.raises(BadData, match=r"extra is in .* but it is in no file"):
        DiffusersFolder(base).headers("transformer")
    shutil.copy(shards[0], shards[1])
    with pytest.raises(BadData, match=r"x_embedder\.weight is in .* too"):
        DiffusersFolder(base).headers("transformer")
    shards[1].unlink()
    with pytest.raises(BadData, match=r"00002.* is missing"):
        DiffusersFolder(base).headers("transformer")
    write_json(folder / INDEX, {"metadata": {}})
    with pytest.raises(BadData, match="no weight_map"):
        DiffusersFolder(base).headers("transformer")


def test_pickles_are_refused_by_name(base):
    weights = base / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadData, match=r"diffusion_pytorch_model\.bin: a pickle.*run code"):
        DiffusersFolder(base).weight_files("vae")
    weights.with_suffix(".bin").unlink()
    with pytest.raises(BadData, match="no weights called"):
        DiffusersFolder(base).weight_files("vae")


LEADS_OUT, NO_FILE = "a link that leads out of", "no file, but a folder, a device, a pipe"


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (lambda path: path.symlink_to("/dev/zero"), LEADS_OUT),
        (lambda path: path.symlink_to("/etc"), LEADS_OUT),
        (lambda path: path.symlink_to("nowhere"), NO_FILE),
        (lambda path: path.symlink_to("x"), "a broken link"),
        (lambda path: path.symlink_to("sub"), NO_FILE),
        (os.mkfifo, NO_FILE),
    ],
    ids=["device", "folder", "broken", "loop", "folder inside", "pipe"],
)
def test_what_is_no_file_of_a_tokenizer_is_refused_by_name(left, said, base):
    add_tokenizer(base)
    left(base / "tokenizer/x")
    with pytest.raises(BadData, match=f"tokenizer/x: {said}"):
        DiffusersFolder(base).text_fingerprint()


def test_a_snapshot_of_the_hub_leads_to_its_own_blobs_and_no_others(base, tmp_path):
    for folder in ("a/snapshots", "a/blobs", "b/blobs"):
        (tmp_path / folder).mkdir(parents=True)
    snapshot = base.rename(tmp_path / "a/snapshots/0a1b2c")
    weights = snapshot / "vae/diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    for name in ("a", "b"):
        (tmp_path / name / "blobs/0").write_bytes(data)
    wanted = DiffusersFolder(snapshot).fingerprint("vae")
    weights.unlink()
    weights.symlink_to("../../../blobs/0")
    assert DiffusersFolder(snapshot).fingerprint("vae") == wanted
    weights.unlink()
    weights.symlink_to("../../../../b/blobs/0")
    with pytest.raises(BadData, match=LEADS_OUT):
        DiffusersFolder(snapshot).fingerprint("vae")
    weights.unlink()
    weights.symlink_to("../../../blobs/0")
    (tmp_path / "a/snapshots").rename(tmp_path / "a/others")  # then what is beside is no cache
    with pytest.raises(BadData, match=LEADS_OUT):
        DiffusersFolder(tmp_path / "a/others/0a1b2c").fingerprint("vae")


def test_a_model_card_is_a_file_and_no_book(base):
    (base / "README.md").unlink()
    (base / "README.md").mkdir()
    assert DiffusersFolder(base).license is None
    (base / "README.md").rmdir()
    os.mkfifo(base / "README.md")
    assert DiffusersFolder(base).license is None
    (base / "README.md").unlink()
    with (base / "README.md").open("wb") as file:
        file.truncate(MOST_JSON + 1)
    with pytest.raises(BadData, match=r"README\.md: cannot be read \(it is longer than"):
        _ = DiffusersFolder(base).license


def test_plain_names_stay_in_their_folder():
    assert is_plain_name("model-00001-of-00002.safetensors")
    assert not any(is_plain_name(name) for name in ("", ".", "..", "a/b", "a\\b", ".hidden", "\0"))


# ---- the index of a modular pipeline -----------------------------------------------------------

MODULAR = "modular_model_index.json"


def modular(base, **changes):
    """The base with the index that a modular pipeline would have written, and these entries."""
    plain = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").unlink()
    entries = {
        name: [*entry, {"pretrained_model_name_or_path": "/gone", "subfolder": name}]
        if isinstance(entry, list)
        else entry
        for name, entry in plain.items()
    }
    write_json(base / MODULAR, entries | changes)
    return plain


def taken_from(repo, subfolder="", **more):
    kind = ["transformers", "T5EncoderModel"]
    said = {"pretrained_model_name_or_path": repo, "subfolder": subfolder, "type_hint": kind}
    return [None, None, said | more]


def test_a_modular_index_is_read_as_the_plain_one_would_be(base):
    plain = modular(base)
    folder = DiffusersFolder(base)
    assert folder.model_index == plain and folder.index == base / MODULAR
    assert folder.folder("vae") == base / "vae"  # although the one it was saved to is gone


def test_a_part_that_was_not_loaded_when_it_was_saved_is_what_it_should_be(base):
    hinted = taken_from("owner/text", "text_encoder")
    modular(base, text_encoder=hinted, other=hinted, nothing=taken_from(None))
    folder = DiffusersFolder(base)
    assert folder.model_index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert folder.components["other"] == "T5EncoderModel"  # it is somewhere
    assert folder.model_index["nothing"] == [None, None] and "nothing" not in folder.components


@pytest.mark.parametrize(
    "entry, said",
    [
        (
            taken_from("owner/text", "other"),
            "from owner/text, and nothing is downloaded unasked. To have it: `hf download "
            "owner/text --include 'other/*' --local-dir {base}`",
        ),
        (
            taken_from("owner/text", "a b", revision="v1.0"),
            "`hf download owner/text --include 'a b/*' --revision v1.0 --local-dir {base}`, "
            "then rename {base}/a b to {base}/other",
        ),
        (taken_from("owner/text"), "`hf download owner/text --local-dir {base}/other`"),
        (taken_from("/gone", "x"), "from /gone, and nothing is downloaded unasked. To have it: put "
         "what is in /gone/x into {base}/other"),
        (taken_from("$(rm -r ~)/x"), "To have it: put what is in $(rm -r ~)/x into {base}/other"),
        (["a", "B", {}], "takes it from there, and nothing is downloaded unasked. To have it: "
         "put it into {base}/other"),
        (["a", "B"], "there is no other/ in this pipeline folder."),
    ],
)  # fmt: skip
def test_a_part_that_is_not_here_is_told_how_to_get(base, entry, said):
    modular(base, other=entry)
    with pytest.raises(BadData) as refused:
        DiffusersFolder(base).folder("other")
    assert str(refused.value).endswith(said.format(base=base))


def test_a_folder_on_this_machine_is_not_looked_for_on_the_hub(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/other").mkdir(parents=True)
    modular(base, other=taken_from("models/other"))
    with pytest.raises(BadData, match="put what is in models/other into"):
        DiffusersFolder(base).folder("other")


def test_a_part_that_lies_in_a_folder_of_another_name_is_refused(base):
    """diffusers would load it from there, whatever is in the folder that is called like it."""
    modular(base, vae=taken_from("/gone", "vae_2"))
    assert DiffusersFolder(base).folder("vae")
    (base / "vae_2").mkdir()
    with pytest.raises(BadData, match=r"has vae in vae_2/, but it is read from vae/ only\. Rename"):
        DiffusersFolder(base).folder("vae")


@pytest.mark.parametrize(
    "entry, said",
    [
        (taken_from("a/b", "../vae"), r"takes vae from '\.\./vae', which leads out of a folder"),
        (taken_from("a/b", "/etc"), "takes vae from '/etc', which leads out of a folder"),
        (taken_from("a/b", "a\\b"), "which leads out of a folder"),
        (taken_from(["a/b"]), "does not say in words from where vae is loaded"),
        (taken_from("a/b", 5), "does not say in words from where vae is loaded"),
        (taken_from("a/b", revision={}), "does not say in words from where vae is loaded"),
        (taken_from("a/b", type_hint="x"), "the type_hint of vae is no library and class"),
    ],
)
def test_an_entry_of_a_modular_index_that_is_none_is_refused(base, entry, said):
    modular(base, vae=entry)
    with pytest.raises(BadData, match=f"{MODULAR}: .*{said}"):
        DiffusersFolder(base).components


def test_a_part_of_a_modular_index_does_not_lead_out_of_the_folder(base):
    modular(base, **{"../vae": taken_from("a/b")})
    with pytest.raises(BadData, match=r"names a component '\.\./vae', which is no plain folder"):
        DiffusersFolder(base).components


def test_a_copy_of_a_modular_folder_points_at_nothing_but_itself(base):
    elsewhere = taken_from("owner/text", "x")
    there = ["diffusers", "AutoencoderKLFlux2", {"repo": "a/b", "variant": "fp16", "revision": "1"}]
    modular(base, other=elsewhere, vae=there, text_encoder=taken_from("a/b"))
    (name, data), *more = DiffusersFolder(base).own_indexes().items()
    found = json.loads(data)
    assert name == MODULAR and not more and found["_class_name"] == "Flux2KleinPipeline"
    kind, nobody = ["diffusers", "AutoencoderKLFlux2"], {"pretrained_model_name_or_path": None}
    own = nobody | {"subfolder": "vae", "variant": None, "revision": None, "type_hint": kind}
    assert found["vae"] == [*kind, own]
    text = found["text_encoder"]
    assert text[:2] == [None, None] and text[2]["type_hint"] == ["transformers", "T5EncoderModel"]
    assert found["other"] == elsewhere  # not a part of the copy


def test_a_plain_index_is_copied_as_it_is(base):
    assert DiffusersFolder(base).own_indexes() == {}

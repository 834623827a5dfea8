"""Hostile models: bases, lifted folders, checkpoints, and the diffusers folders they come from."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from asymlift.artifacts import basis_file, manifest
from asymlift.artifacts.manifest import canonical_json, write_manifest
from asymlift.artifacts.parsing import MOST_JSON
from asymlift.artifacts.safetensors_stream import load_tensors, save_tensors
from asymlift.embedded import MODELS
from tests.reliability.attacks import (
    BAD_DATA,
    BAD_RECIPE,
    CANNOT_WRITE,
    DEEP,
    DONE,
    LOOK,
    UNAVAILABLE,
    Attack,
    Built,
    Orders,
    small_setting,
    sparse,
)
from tests.reliability.jail import Cell

WEIGHTS = "diffusion_pytorch_model"
MANY = 1 << 62
TABLES = b'{"":0},' * ((MOST_JSON - 100) // 7)  # hardly anything takes more memory for its length


def header(body: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file that says what we like."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


TENSOR_FILES: dict[str, Callable[[Cell], bytes]] = {
    "a pickle": lambda cell: cell.pickle(),
    "a shape of 2^62": lambda cell: header({"a": entry([MANY], 0, 4 * MANY)}, b"0000"),
    "a shape that overflows": lambda cell: header({"a": entry([MANY, 4], 0, 0)}),
    "a header of 2^62 bytes": lambda cell: header({}, length=MANY),
    "a header longer than the file": lambda cell: header({}, b"0" * 100, length=10_000),
    "overlapping tensors": lambda cell: header(
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12
    ),
    "a hole": lambda cell: header({"a": entry([1], 4, 8)}, b"0" * 8),
    "deeply nested": lambda cell: header(b'{"a":' + b"[" * DEEP),
    "numbers of many digits": lambda cell: header(b'{"a":' + b"9" * 100_000 + b"}"),
    "a header of 16 MB of tables": lambda cell: header(b'{"a":[' + TABLES + b"0]}"),
    "a header of 90 MB of lists": lambda cell: header(b'{"a":[' + b"[]," * 30_000_000 + b"[]]}"),
    "lists for texts": lambda cell: header({"__metadata__": [1], "a": []}),
    "nothing": lambda cell: b"",
}


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "a broken link": lambda path: path.symlink_to("nowhere"),
    "a folder": lambda path: path.mkdir(),
}


def copied_base(cell: Cell) -> Path:
    return Path(shutil.copytree(MODELS["tiny"], cell.inputs / "base"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- the base ----------------------------------------------------------------------------------


def base_attacks() -> Iterator[Attack]:
    def attack(
        name: str, spoil: Callable[[Cell, Path], object], *, inspected: bool = True
    ) -> Attack:
        """Nothing is cached, so fit-basis loads the VAE; `prepare` loads the text encoder too."""

        def prepare(cell: Cell, built: Built) -> Orders:
            base = copied_base(cell)
            spoil(cell, base)
            shards = f"{built.folder}/shards/000000.tar"
            source = {"source": shards, "out": str(cell.out / "shards"), "shard_samples": 4}
            path = built.write(
                cell, model={"base": str(base)}, prepare=source, data={"resize": {"sides": [32]}}
            )
            built.run(cell, "basis.safetensors")
            ends = (BAD_DATA, BAD_RECIPE, UNAVAILABLE, DONE)
            orders: Orders = [
                (["prepare", path], ends),
                (["convert", path, "--verify", "maps"], ends),
            ]
            return ([(["inspect", base], LOOK)] if inspected else []) + orders

        return Attack(f"base, {name}", prepare)

    for component in ("transformer", "vae", "text_encoder"):
        stem = "model" if component == "text_encoder" else WEIGHTS

        def pickles(cell: Cell, base: Path, component: str = component, stem: str = stem) -> None:
            (base / component / f"{stem}.safetensors").unlink()
            for name in (f"{stem}.bin", "pytorch_model.bin", "model.pt", f"{stem}.fp16.bin"):
                (base / component / name).write_bytes(cell.pickle())

        yield attack(f"{component} of pickles", pickles)

        def led_out(cell: Cell, base: Path, component: str = component, stem: str = stem) -> None:
            weights = base / component / f"{stem}.safetensors"
            names = list(load_tensors(weights))
            weights.rename(cell.victims / "w.safetensors")
            path = base / component / f"{stem}.safetensors.index.json"
            file = ("../../../victims/w.safetensors", str(cell.victims / "w.safetensors"))
            index = {"metadata": {}, "weight_map": dict.fromkeys(names, file[len(component) % 2])}
            path.write_text(json.dumps(index))

        yield attack(f"{component} whose index leads out", led_out)

    for name, content in TENSOR_FILES.items():
        for component in ("transformer", "vae"):

            def spoil(
                cell: Cell,
                base: Path,
                content: Callable[[Cell], bytes] = content,
                component: str = component,
            ) -> None:
                (base / component / f"{WEIGHTS}.safetensors").write_bytes(content(cell))

            if component == "transformer" or "90 MB" not in name:
                yield attack(f"{component} {name}", spoil)

    def listed(**changes: Any) -> Callable[[Cell, Path], None]:
        return lambda cell, base: edit_json(base / "model_index.json", **changes)

    indexes: dict[str, dict[str, Any]] = {
        "a component that leads out": {"../../victims": ["diffusers", "AutoencoderKLFlux2"]},
        "a component of os": {"vae": ["os", "system"]},
        "a component of subprocess": {"text_encoder": ["subprocess", "Popen"]},
        "a component of a module beside it": {"tokenizer": ["evil", "Evil"]},
        "a component that is a function": {"text_encoder": ["transformers", "pipeline"]},
        "a component that is a module": {"tokenizer": ["transformers", "utils"]},
        "a component that is no text": {"vae": ["diffusers", {"a": 1}]},
        "a pipeline that is a module": {"_class_name": "utils"},
        "a pipeline of other code": {"_class_name": ["pipeline_evil", "Evil"]},
        "a tokenizer of any class": {"tokenizer": ["transformers", "AutoTokenizer"]},
        "an encoder of any class": {"text_encoder": ["transformers", "AutoModel"]},
        "a pipeline as a component": {"vae": ["diffusers", "DiffusionPipeline"]},
        "a component that is no part": {"vae": ["transformers", "Trainer"]},
        "settings of its own": {"custom_pipeline": "evil", "device_map": "auto"},
    }
    for name, changes in indexes.items():
        change = listed(**changes)

        def with_code(
            cell: Cell, base: Path, change: Callable[[Cell, Path], None] = change
        ) -> None:
            change(cell, base)
            code_everywhere(cell, base)

        yield attack(f"index with {name}", with_code)

    yield attack("code beside every part", code_everywhere)

    templates: dict[str, Callable[[Cell], str]] = {
        "calls": lambda c: "{{ cycler.__init__.__globals__.os.system('" + c.command + "') }}",
        "is broken": lambda c: "{% if",
        "divides by zero": lambda c: "{{ 1 // (messages | length - messages | length) }}",
        "names what is not there": lambda c: "{{ a.b.c }}",
    }
    for name, text in templates.items():

        def template(cell: Cell, base: Path, text: Callable[[Cell], str] = text) -> None:
            edit_json(base / "tokenizer/tokenizer_config.json", chat_template=text(cell))
            (base / "tokenizer/chat_template.jinja").write_text(text(cell))

        yield attack(f"a chat template that {name}", template)

    configs: dict[str, dict[str, dict[str, Any]]] = {
        "a transformer of class 5": {"transformer": {"_class_name": 5}},
        "a transformer of another class": {"transformer": {"_class_name": "os.system"}},
        "a transformer without end": {"transformer": {"num_layers": 10**9}},
        "a transformer of huge width": {"transformer": {"num_attention_heads": 10**9}},
        "a transformer of words": {"transformer": {"in_channels": "12", "patch_size": []}},
        "a VAE of huge width": {"vae": {"block_out_channels": [2**40, 2**40]}},
        "a VAE of many levels": {"vae": {"block_out_channels": [8] * 4000}},
        "a VAE of endless levels": {"vae": {"layers_per_block": 10**9}},
        "a VAE of words": {"vae": {"block_out_channels": "8", "latent_channels": "x"}},
        "an encoder of words": {"text_encoder": {"hidden_size": "x", "layer_types": 5}},
        "an encoder of huge width": {"text_encoder": {"hidden_size": 2**40}},
        "an encoder without end": {"text_encoder": {"num_hidden_layers": 10**9}},
        "an encoder without end by all counts": {
            "text_encoder": {"num_hidden_layers": 10**9, "layer_types": None}
        },
        "an encoder that is quantized": {
            "text_encoder": {"quantization_config": {"quant_method": "bitsandbytes"}}
        },
    }
    for name, parts in configs.items():

        def configured(cell: Cell, base: Path, parts: dict[str, dict[str, Any]] = parts) -> None:
            for part, changes in parts.items():
                edit_json(base / part / "config.json", **changes)

        yield attack(name, configured)

    for file in ("model_index.json", "vae/config.json", "transformer/config.json"):

        def nested(cell: Cell, base: Path, file: str = file) -> None:
            (base / file).write_text("[" * DEEP)

        yield attack(f"deeply nested {file}", nested)

    def endless(cell: Cell, base: Path) -> None:
        (base / "vae/config.json").unlink()
        (base / "vae/config.json").symlink_to("/dev/zero")

    yield attack("a config that is a device", endless)

    for name, leave in NO_FILES.items():
        for component in ("tokenizer", "vae"):

            def beside(
                cell: Cell,
                base: Path,
                leave: Callable[[Path], object] = leave,
                component: str = component,
            ) -> None:
                leave(base / component / "x")

            yield attack(f"{component} with {name} beside its files", beside)

        def card(cell: Cell, base: Path, leave: Callable[[Path], object] = leave) -> None:
            (base / "README.md").unlink(missing_ok=True)
            leave(base / "README.md")

        yield attack(f"a model card that is {name}", card)

    yield attack("a model card that is a hole", lambda cell, base: sparse(base / "README.md"))

    def key(cell: Cell, base: Path) -> None:
        (base / "NOTICE").symlink_to(cell.victims / "file")

    yield attack("a notice that leads to somebody's file", key)

    def hollow(cell: Cell, base: Path) -> None:
        sparse(base / "model_index.json")

    yield attack("an index that is a hole", hollow)

    def adapter(cell: Cell, base: Path) -> None:
        outside = cell.victims / "model"
        shutil.copytree(base / "text_encoder", outside)
        (outside / "model.safetensors").unlink()
        (outside / "pytorch_model.bin").write_bytes(cell.pickle())
        config = {"base_model_name_or_path": str(outside), "peft_type": "LORA"}
        (base / "text_encoder/adapter_config.json").write_text(json.dumps(config))
        (base / "text_encoder/adapter_model.bin").write_bytes(cell.pickle())

    yield attack("an encoder with an adapter of pickles", adapter)


def code_everywhere(cell: Cell, base: Path) -> None:
    """Python files, and every key that makes a library look for them."""
    for name in ("evil", "pipeline_evil", "pipeline", "modeling_evil", "tokenization_evil"):
        for folder in (base, base / "text_encoder", base / "tokenizer", base / "vae"):
            (folder / f"{name}.py").write_text(cell.python)
        (cell.inputs / f"{name}.py").write_text(cell.python)
    model = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.E")
    edit_json(base / "text_encoder/config.json", auto_map=model, custom_pipelines={})
    inner = {"_class_name": "DDPMPipeline", "scheduler": ["evil", "E"], "unet": ["evil", "E"]}
    (base / "vae/model_index.json").write_text(json.dumps(inner))
    tokenizer = {"AutoTokenizer": ["tokenization_evil.E", "tokenization_evil.E"]}
    edit_json(base / "tokenizer/tokenizer_config.json", auto_map=tokenizer)
    for part in ("vae", "transformer"):
        edit_json(base / part / "config.json", auto_map={"AutoModel": "evil.E"})


# ---- a basis -----------------------------------------------------------------------------------


def basis_attacks() -> Iterator[Attack]:
    def attack(name: str, spoil: Callable[[Cell, Path], object]) -> Attack:
        def prepare(cell: Cell, built: Built) -> Orders:
            path = built.write(cell)
            basis = built.run(cell, "basis.safetensors") / "basis.safetensors"
            spoil(cell, basis)
            ends = (BAD_DATA, BAD_RECIPE)
            return [
                (["inspect", basis], (BAD_DATA,)),
                (["verify", basis], (BAD_DATA,)),
                (["convert", path], ends),
            ]

        return Attack(f"basis, {name}", prepare)

    for name, content in TENSOR_FILES.items():

        def replaced(cell: Cell, basis: Path, content: Callable[[Cell], bytes] = content) -> None:
            basis.write_bytes(content(cell))

        if "90 MB" not in name:
            yield attack(name, replaced)

    def tensors(**changes: torch.Tensor) -> Callable[[Cell, Path], None]:
        return lambda cell, basis: save_tensors(basis, changes) and None

    A, s = torch.eye(192, 12), torch.tensor(1.0)
    yield attack("NaN", tensors(proj_mat_p8=A * torch.nan, scale_p8=s))
    yield attack("a wrong shape", tensors(proj_mat_p8=A[:7], scale_p8=s))
    yield attack("three axes", tensors(proj_mat_p8=A[None], scale_p8=s))
    yield attack("a scale of zero", tensors(proj_mat_p8=A, scale_p8=s * 0))
    yield attack("several scales", tensors(proj_mat_p8=A, scale_p8=s.expand(3).contiguous()))
    yield attack("a patch of many digits", tensors(**{"proj_mat_p" + "9" * 9000: A, "scale": s}))

    def stated(**changes: Any) -> Callable[[Cell, Path], None]:
        """Metadata of wrong kinds under a right checksum."""

        def spoil(cell: Cell, basis: Path) -> None:
            metadata = basis_file.read_header(basis).metadata | changes
            metadata["checksum"] = basis_file.UNSEALED
            save_tensors(basis, load_tensors(basis), metadata)
            data = basis.read_bytes()
            basis.write_bytes(basis_file._with_checksum(data, basis_file.checksum_of(basis)))

        return spoil

    for key, value in {
        "alignment": '"r2"',
        "color": "5",
        "num_images": '{"a": 1}',
        "patch": '"8"',
        "spectrum": "[" * DEEP,
        "facts": "not JSON",
        "family": "[1]",
        "order": '{"a": []}',
    }.items():
        yield attack(f"{key} of a wrong kind", stated(**{key: value}))


# ---- a lifted model, a checkpoint --------------------------------------------------------------


def sealed(folder: Path, kind: str, files: dict[str, Any] | None = None) -> None:
    """A manifest that fits, and says what we like beside."""
    (folder / manifest.NAME).unlink()
    write_manifest(folder, kind=kind, facts={"step": 1})
    if files is not None:
        body = json.loads((folder / manifest.NAME).read_bytes())
        body.pop("digest")
        body["files"] |= files
        body["digest"] = manifest.digest_json(body)
        (folder / manifest.NAME).write_bytes(canonical_json(body))


def stated(path: Path, value: Any) -> None:
    path.write_bytes(value if isinstance(value, bytes) else canonical_json(value))


NAMES = {
    "a file above": "../../../../victims/file",
    "an absolute file": "/etc/passwd",
    "a crooked name": "transformer/../../x",
    "a name with backslashes": "..\\..\\victims\\file",
}
FILE = {"size": 10, "sha256": "0" * 64}
BODIES: dict[str, Any] = {
    "is a list": [],
    "has a list of files": {"format": 1, "kind": "lifted", "facts": {}, "files": ["x"]},
    "has files of words": {"format": 1, "kind": "lifted", "facts": {}, "files": {"a": "b"}},
    "has nothing": {"format": 1},
}


def folder_attack(
    part: str, name: str, spoil: Callable[[Cell, Path], object], *commands: str
) -> Attack:
    """`part` of a run, spoilt; every command that reads it."""

    def prepare(cell: Cell, built: Built) -> Orders:
        path = built.write(cell, sample={"steps": 1})
        parts = ["lifted"] if part == "lifted" else ["lifted", "checkpoints/step-000001"]
        run = built.run(cell, *parts)
        folder = run / parts[-1]
        spoil(cell, folder)
        weights = "lifted" if part == "lifted" else "ema"
        ends = (BAD_DATA, BAD_RECIPE, UNAVAILABLE, CANNOT_WRITE, DONE)
        lora = ("finetune.train={lora: {rank: 2, alpha: 2}}", "finetune.loss.reference=shared")
        orders: dict[str, tuple[list[Any], tuple[int, ...]]] = {
            "inspect": (["inspect", folder], (*LOOK, BAD_RECIPE)),
            "verify": (["verify", folder], (BAD_DATA,)),
            "sample": (["sample", path, "--weights", weights, "--prompt", "a red disc"], ends),
            "finetune": (
                ["finetune", path, *small_setting("finetune.steps=2", *lora)],
                ends,
            ),
        }
        return [orders[command] for command in commands or orders]

    return Attack(f"{part}, {name}", prepare)


def manifest_attacks() -> Iterator[Attack]:
    for part, kind in (("lifted", "lifted"), ("checkpoint", "checkpoint")):
        for name, file in NAMES.items():

            def named(cell: Cell, folder: Path, kind: str = kind, file: str = file) -> None:
                sealed(folder, kind, {file: FILE})

            yield folder_attack(part, f"manifest with {name}", named, "verify", "sample")
        for name, body in BODIES.items():

            def bodied(cell: Cell, folder: Path, body: Any = body) -> None:
                if isinstance(body, dict):
                    body = body | {"digest": manifest.digest_json(body)}
                stated(folder / manifest.NAME, body)

            yield folder_attack(
                part, f"manifest that {name}", bodied, "inspect", "verify", "sample"
            )

        def deep(cell: Cell, folder: Path) -> None:
            stated(folder / manifest.NAME, b"[" * DEEP)

        yield folder_attack(part, "manifest, deeply nested", deep)

        def linked(cell: Cell, folder: Path, kind: str = kind) -> None:
            path = next(iter(sorted(folder.rglob("*.safetensors"))))
            shutil.move(path, cell.victims / "w")
            path.symlink_to(cell.victims / "w")
            (folder / "more").symlink_to("/etc/passwd")
            sealed(folder, kind)

        yield folder_attack(part, "links that lead out", linked, "verify")

        def endless(cell: Cell, folder: Path, kind: str = kind) -> None:
            (folder / "zero").symlink_to("/dev/zero")
            os.mkfifo(folder / "fifo")

        yield folder_attack(part, "a device and a pipe", endless, "verify", "inspect")

        def pickled(cell: Cell, folder: Path, kind: str = kind) -> None:
            for path in folder.rglob("*.safetensors"):
                path.write_bytes(cell.pickle())
            (folder / "mp_rank_00_model_states.pt").write_bytes(cell.pickle())
            sealed(folder, kind)

        yield folder_attack(part, "pickles for weights", pickled)


def lifted_attacks() -> Iterator[Attack]:
    facts_file = "transformer/asymlift.json"

    def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Attack:
        def spoil(cell: Cell, folder: Path) -> None:
            (cell.inputs / "evil.py").write_text(cell.python)
            facts = json.loads((folder / facts_file).read_bytes())
            said = change(facts)
            stated(folder / facts_file, facts if said is None else said)
            sealed(folder, "lifted")

        return folder_attack("lifted", name, spoil, "inspect", "sample", "finetune")

    yield changed("fingerprints in a list", lambda facts: facts.update(fingerprints=[[1, 2]]))
    yield changed("networks of numbers", lambda facts: facts.update(networks=["transformer", 5]))
    yield changed("a family that is code", lambda facts: facts.update(family="evil:FAMILY"))
    yield changed("a family of numbers", lambda facts: facts.update(family=[1]))
    yield changed("geometry of words", lambda facts: facts.update(geometry={"a": 1}))
    yield changed("huge geometry", lambda facts: facts["geometry"].update(vae_factor=10**9))
    yield changed("colours of words", lambda facts: facts.update(color="red"))
    yield changed("no fingerprints", lambda facts: facts.pop("fingerprints") and None)
    yield changed("deeply nested facts", lambda facts: b"[" * DEEP)

    def tensors(cell: Cell, folder: Path) -> None:
        path = folder / "transformer/asymlift.safetensors"
        save_tensors(path, {name: t * torch.nan for name, t in load_tensors(path).items()})
        sealed(folder, "lifted")

    yield folder_attack("lifted", "NaN in A", tensors)

    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "a transformer without end": ("transformer/config", {"num_layers": 10**9}),
        "a transformer of huge width": ("transformer/config", {"num_attention_heads": 10**9}),
        "a transformer of words": ("transformer/config", {"num_layers": "x", "mlp_ratio": {}}),
        "a scheduler of words": ("scheduler/scheduler_config", {"shift": "x", "base_shift": []}),
    }
    for name, (file, changes) in configs.items():

        def configured(
            cell: Cell, folder: Path, file: str = file, changes: dict[str, Any] = changes
        ) -> None:
            edit_json(folder / f"{file}.json", **changes)
            sealed(folder, "lifted")

        yield folder_attack("lifted", name, configured, "sample", "inspect", "finetune")

    def code(cell: Cell, folder: Path) -> None:
        code_everywhere(cell, folder)
        sealed(folder, "lifted")

    yield folder_attack("lifted", "code beside every part", code, "inspect", "sample", "finetune")


def checkpoint_attacks() -> Iterator[Attack]:
    def state(name: str, body: Callable[[dict[str, Any]], Any]) -> Attack:
        def spoil(cell: Cell, folder: Path) -> None:
            values = json.loads((folder / "state.json").read_bytes())
            said = body(values)
            stated(folder / "state.json", values if said is None else said)
            sealed(folder, "checkpoint")

        return folder_attack("checkpoint", name, spoil, "inspect", "sample", "finetune")

    yield state("a state that is nested deeply", lambda values: b"[" * DEEP)
    yield state("a state that is a list", lambda values: [])
    yield state("a state that is empty", lambda values: {})
    yield state("a state of 90 MB", lambda values: b'{"a":[' + b"[]," * 30_000_000 + b"[]]}")
    yield state("a state of 16 MB", lambda values: b'{"a":[' + TABLES + b"0]}")
    yield state("parameters of words", lambda values: values.update(parameters="x"))
    yield state("adapters of words", lambda values: values.update(lora="x"))
    yield state("adapters of a rank alone", lambda values: values.update(lora={"rank": 10**9}))
    yield state(
        "adapters of huge rank", lambda values: values.update(lora={"rank": 10**9, "alpha": 1.0})
    )
    yield state("fingerprints of words", lambda values: values.update(fingerprints=[1]))
    yield state("a step of words", lambda values: values.update(step="x", samples={}))
    yield state("a recipe of words", lambda values: values.update(recipe=5, seen="x"))

    def missing(cell: Cell, folder: Path) -> None:
        (folder / "optimizer.safetensors").unlink()
        sealed(folder, "checkpoint")

    yield folder_attack("checkpoint", "without moments", missing, "inspect", "sample", "finetune")

    def other(cell: Cell, folder: Path) -> None:
        for name in ("trainable", "ema", "optimizer"):
            save_tensors(folder / f"{name}.safetensors", {"../x": torch.ones(3)})
        sealed(folder, "checkpoint")

    yield folder_attack("checkpoint", "other tensors", other, "inspect", "sample", "finetune")

    def hollow(cell: Cell, folder: Path) -> None:
        sparse(folder / "state.json", 4 << 30)

    yield folder_attack("checkpoint", "a state that is a hole", hollow, "inspect", "sample")

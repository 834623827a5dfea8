"""Reading a diffusers folder from this machine: the transformer, and what goes with it.

Never from the network, never a pickle, never code that came with the checkpoint.
"""

import inspect
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from asymlift.artifacts.diffusers_folder import (
    TEXT_NETS,
    DiffusersFolder,
    check_component_name,
    read_json,
    weight_headers,
)
from asymlift.artifacts.safetensors_stream import Header
from asymlift.errors import BadData, Unavailable
from asymlift.families.base import TRANSFORMER, Family, check_needs
from asymlift.families.refusals import SAME_NETWORK
from asymlift.runtime import third_party

LIBRARIES = ("diffusers", "transformers")  # where the classes of a pipeline may come from
# Pieces of a model of these libraries, which do not list them where model_index.json says:
# the module that has the class, and what the piece is in the config of the whole.
# PRX's text encoder: as published, as a pipeline saves it, and as it is saved once diffusers has
# loaded it. https://github.com/huggingface/diffusers/issues/13142
PIECES = dict.fromkeys(
    ("prx.T5GemmaEncoder", "transformers.T5GemmaEncoder", "diffusers.T5GemmaEncoder"),
    ("transformers.models.t5gemma.modeling_t5gemma", "encoder"),
)
# What modular pipelines take before anything is loaded -> key and files that name the class.
NAMED_BY = {
    "AutoTokenizer": ("tokenizer_class", ("tokenizer_config.json",)),
    "AutoProcessor": (
        "processor_class",
        ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"),
    ),
}
SHOWN = 5  # names in a message
# Of one network; the largest transformers have some thousand. A config asks for any number.
MOST_PARAMETERS = 1 << 15


def load_transformer(
    folder: Path | str,
    family: Family,
    *,
    dtype: Literal["stored"] | torch.dtype = "stored",
    component: str = TRANSFORMER,
) -> nn.Module:
    """Return the family's stock class with the weights of FOLDER/COMPONENT, in eval mode.

    Each tensor keeps the dtype it is stored in, unless one is asked for: a lifted checkpoint has
    float32 maps around a bf16 trunk. What the class keeps in float32 is that in any case. The
    weights are mapped from the files, not copied.
    """
    folder = _existing_folder(Path(folder)) / component
    config = read_json(_existing_folder(folder) / "config.json")
    expected = family.transformer.rpartition(":")[2]
    # PRX as its authors convert it does not say: then model_index.json has
    if config.get("_class_name", expected) != expected:
        raise BadData(
            f"{folder}: holds a {config.get('_class_name')}, "
            f"but family {family.name} is a {expected}"
        )
    headers = weight_headers(folder)
    with _NoInit():  # built for real, so that tables which are no weights are right
        net = _built(family, config, folder / "config.json")
    _check_names_and_shapes(folder, net, headers)
    for path, header in headers.items():
        net.load_state_dict(_read_tensors(path, header.tensors, dtype), strict=False, assign=True)
    if isinstance(dtype, torch.dtype):
        net.to(dtype)
    keep_float32(net)
    return net.eval()


def keep_float32(net: nn.Module) -> None:
    """Give what the class names for it float32, as diffusers' loader does: sums of 1 and a scale.

    Only halves are changed, so float64 stays.
    """
    kept = set(getattr(net, "_keep_in_fp32_modules", None) or ())
    for name, parameter in net.named_parameters():
        if kept & set(name.split(".")) and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def weightless_transformer(
    config: Mapping[str, Any],
    family: Family,
    dtype_of: Callable[[str], torch.dtype],
    origin: object,
) -> nn.Module:
    """Return the family's stock class on the meta device: shapes and dtypes, nothing to hold.

    `origin` is where the config is from, for the reader.
    """
    with torch.device("meta"):
        net = _built(family, config, origin)
    for name, parameter in net.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name))
    keep_float32(net)
    return net.eval()


def load_pipeline_parts(
    folder: Path | str,
    names: Collection[str],
    *,
    library: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return the named components of a pipeline folder, models in eval mode (as stored, or dtype).

    A component that the index lists as null is None. `library` is a family's own package, whose
    classes are run too.
    """
    found = DiffusersFolder(_existing_folder(Path(folder)))
    return {name: _load_part(found, name, library, dtype) for name in names}


def load_pipeline(
    folder: Path | str,
    components: Collection[str] | None = None,
    *,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Return the folder's own pipeline without its transformer: for prompts, latents, schedules.

    `components` are those to load (default: all but transformers and what the family has no use
    for); the others are None. Where the index names a modular pipeline, or another one for the same
    network, that the family is not driven by, it is the one that it is driven by.
    """
    found = DiffusersFolder(_existing_folder(Path(folder)))
    origin, index = found.index, found.model_index
    parts = {k for k, v in index.items() if isinstance(v, list) and len(v) == 2}
    wanted = usual_parts(parts, family) if components is None else components
    settings = {k: v for k, v in index.items() if k not in parts and not k.startswith("_")}
    if family is not None and any(name.startswith(TEXT_NETS) for name in wanted):
        check_needs(family)  # before anything large is read
    library = family.library if family else None
    pipeline = _pipeline_class(origin, index.get("_class_name"), library)
    loaded = load_pipeline_parts(folder, wanted, library=library, dtype=dtype)
    with _of_files(origin, f"no {pipeline.__name__} can be made of it"):
        given = {**dict.fromkeys(parts), **loaded}
        other = _is_modular(pipeline) or pipeline.__name__ in SAME_NETWORK
        if family is None or not other or pipeline.__name__ in family.pipelines:
            return _assembled(pipeline, settings, given)
        pipeline = _pipeline_class(origin, _plain_pipeline(pipeline.__name__, family), library)
        return _assembled(pipeline, *_taken(pipeline, settings, given))


def usual_parts(names: Collection[str], family: Family | None) -> set[str]:
    """Those that pictures and prompts need: no transformer, and nothing idle."""
    idle = family.idle if family else ()
    return {name for name in names if not name.endswith("transformer") and name not in idle}


def embed_prompts(
    family: Family, pipeline: Any, prompts: Sequence[str], length: int | None
) -> list[dict[str, Tensor]]:
    """Return the family's embeddings; the chat template that they need came with the model."""
    try:
        return family.encode_prompt(pipeline, prompts, length)
    except Exception as error:
        if not _is_of_template(error):
            raise
        raise BadData(f"{_template_folder(pipeline)}: its chat template: {error}") from error


def _is_of_template(error: Exception) -> bool:
    """Whether a template is broken, its sandbox has refused it, or its code has failed."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, TemplateError) or any(f.filename == "<template>" for f in frames)


def _template_folder(pipeline: Any) -> str:
    parts = (getattr(pipeline, name, None) for name in ("tokenizer", "processor"))
    found = [getattr(part, "tokenizer", part) for part in parts if part is not None]
    return str(getattr(found[0], "name_or_path", "")) if found else type(pipeline).__name__


def text_parts(folder: DiffusersFolder, family: Family) -> set[str]:
    """The components that a prompt's embedding may need: all but what makes pictures."""
    parts = usual_parts(folder.components, family)
    return parts if family.text_needs_vae else parts - {"vae"}


class _NoInit(TorchFunctionMode):
    """Leaves new weights uninitialised: all of them are about to be replaced."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _transformer_class(family: Family) -> Any:
    module, _, name = family.transformer.rpartition(":")
    return _class_in(module or "diffusers", name, f"family {family.name}")


def _built(family: Family, config: Mapping[str, Any], origin: object) -> nn.Module:
    """The family's stock class by a config, whose values may be anything."""
    cls = _transformer_class(family)
    with _of_files(origin, f"no {cls.__name__} can be built by it"), _bounded():
        net: nn.Module = cls.from_config(config)
    return net


@contextmanager
def _of_files(origin: object, what: str) -> Iterator[None]:
    """Around code of the libraries that reads somebody's files: any error of it is the files'."""
    try:
        yield
    except ImportError as error:
        raise Unavailable(f"{origin} needs a package that is not there: {error}") from error
    except Exception as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()[:2]
        reason = " ".join(line.strip() for line in lines)
        raise BadData(f"{origin}: {what}: {reason}") from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Building a network ends at so many parameters, before a config without end fills memory."""
    count = 0

    def seen(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > MOST_PARAMETERS:
            raise ValueError(f"it asks for more than {MOST_PARAMETERS} tensors")

    hook = register_module_parameter_registration_hook(seen)
    try:
        yield
    finally:
        hook.remove()


def _pipeline_class(origin: Path, name: object, own: str | None) -> Any:
    """The pipeline's class: of diffusers, unless the family's own package has one of that name."""
    is_ours = own is not None and hasattr(third_party.library(own), str(name))
    found = _class_in(own if is_ours and own else "diffusers", name, origin)
    diffusers = third_party.library("diffusers")
    if not issubclass(found, (diffusers.DiffusionPipeline, diffusers.ModularPipeline)):
        raise BadData(f"{origin}: {name} is no pipeline")
    return found


def _is_modular(kind: Any) -> bool:
    return issubclass(kind, third_party.library("diffusers").ModularPipeline)


def _assembled(kind: Any, settings: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """A pipeline of these parts; a modular one gets them after it is made."""
    if not _is_modular(kind):
        return kind(**settings, **parts)
    pipeline = kind()
    there = {name: part for name, part in parts.items() if part is not None}
    pipeline.update_components(**{**_known(settings, pipeline.config), **there})
    return pipeline


def _plain_pipeline(other: str, family: Family) -> str:
    """The family's pipeline that is called most like another one for its network."""
    stem = other.removesuffix("ModularPipeline")
    alike = [name for name in family.pipelines if stem.startswith(name.removesuffix("Pipeline"))]
    if not alike:
        drivers = " or ".join(family.pipelines)
        raise ValueError(f"family {family.name} is driven by {drivers}, not by {other}")
    return max(alike, key=len)


def _taken(
    kind: Any, settings: Mapping[str, Any], parts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a plain pipeline takes of a modular one's settings and parts; what it lacks is None."""
    takes = list(inspect.signature(kind.__init__).parameters.values())[1:]
    names = {p.name for p in takes}
    lacks = {p.name for p in takes if p.default is p.empty}
    return _known(settings, names), {**dict.fromkeys(lacks), **_known(parts, names)}


def _known(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _component_kinds() -> tuple[type, ...]:
    """What a part of a pipeline may be. Not a class that looks for another by what files say."""
    diffusers, transformers = map(third_party.library, LIBRARIES)
    return (
        nn.Module,
        diffusers.SchedulerMixin,
        diffusers.BaseGuidance,
        transformers.PreTrainedTokenizerBase,
        transformers.ProcessorMixin,
        transformers.ImageProcessingMixin,
        transformers.FeatureExtractionMixin,
    )


def _class_in(module: str, name: object, origin: object) -> Any:
    """Return a class by name; an unknown one means another version of the library."""
    if not isinstance(name, str):
        raise BadData(f"{origin}: names a class {name!r}, which is no text")
    try:
        package = third_party.library(module)
    except ImportError as error:
        raise Unavailable(f"{origin} needs {module}, which cannot be imported: {error}") from error
    if not hasattr(package, name):
        version = getattr(package, "__version__", "as installed")
        raise Unavailable(
            f"{origin} needs {module}.{name}, which {module} {version} does not have; "
            f"install a version of {module} that does"
        )
    found = getattr(package, name)
    if not isinstance(found, type):
        raise BadData(f"{origin}: {module}.{name} is a {type(found).__name__}, not a class")
    return found


def _load_part(folder: DiffusersFolder, name: str, own: str | None, dtype: Any) -> Any:
    origin, index = folder.index, folder.model_index
    check_component_name(origin, name)
    entry = index.get(name)
    if not (isinstance(entry, list) and len(entry) == 2):
        known = sorted(k for k, v in index.items() if isinstance(v, list))
        raise BadData(f"{origin}: no component {name!r}; it has {', '.join(known)}")
    library, class_name = entry
    if class_name is None:
        return None
    if library == "transformers" and class_name in list(NAMED_BY):
        class_name = _named_by_files(folder.folder(name), class_name)
    is_own = own is not None and f"{library}.".startswith(f"{own}.")
    piece = None
    if not is_own and f"{library}.{class_name}" in PIECES:
        library, piece = PIECES[f"{library}.{class_name}"]
    if library not in LIBRARIES and not is_own and piece is None:
        raise BadData(
            f"{origin}: {name} needs code from {library!r}; only classes of "
            f"{' and '.join(LIBRARIES)} are run"
        )
    part = _class_in(library, class_name, origin)
    if not is_own and not issubclass(part, _component_kinds()):
        raise BadData(
            f"{origin}: {name} is a {library}.{class_name}, which no part of a pipeline can be; "
            "name the class of the model, tokenizer, processor or scheduler itself"
        )
    place = folder.folder(name)
    is_model = issubclass(part, nn.Module)
    options: dict[str, Any] = {"local_files_only": True}
    if is_model:
        weight_headers(place)  # a pickle is refused, and what would fill memory when it is parsed
        if (place / "config.json").is_file():
            _check_depth(place / "config.json", read_json(place / "config.json"))
        options |= {"use_safetensors": True, "output_loading_info": True}
        if dtype is not None:
            options["torch_dtype" if library == "diffusers" else "dtype"] = dtype
    vocabularies = set(getattr(part, "vocab_files_names", {}).values())
    if vocabularies and not any((place / file).is_file() for file in vocabularies):
        raise BadData(f"{place}: no vocabulary in it ({_some(sorted(vocabularies))})")
    missing: Collection[str] = ()
    with _of_files(place, f"cannot be loaded as {class_name}"), _bounded():
        if piece is not None:
            options["config"] = _config_of_piece(part, piece, place)
        loaded = part.from_pretrained(str(place), **options)
        if is_model:
            loaded, report = loaded
            missing = report["missing_keys"]
    if missing:
        raise BadData(f"{place}: weights are missing: {_some(sorted(missing))}")
    return loaded.eval() if is_model else loaded


def _config_of_piece(part: Any, piece: str, place: Path) -> Any:
    """The config of a piece of a model, whose class would read it as the config of the whole.

    It is saved with its own, or with the whole's, which has it.
    """
    whole = part.config_class
    if read_json(place / "config.json").get("model_type") == whole.model_type:
        found = whole.from_pretrained(str(place), local_files_only=True)
        return getattr(found, piece, found)
    return whole.sub_configs[piece].from_pretrained(str(place), local_files_only=True)


def _named_by_files(place: Path, kind: str) -> str:
    """The class of a tokenizer or processor that an index leaves to its own files."""
    key, files = NAMED_BY[kind]
    for path in (place / file for file in files):
        if path.is_file() and isinstance(name := read_json(path).get(key), str):
            return name
    raise BadData(f"{place}: no `{key}` in {' or '.join(files)}, so it cannot be told what it is")


def _check_depth(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse so many layers that a library fills memory with their names before it builds one."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_depth(path, value)
        elif "layers" in key and type(value) is int and value > MOST_PARAMETERS:
            raise BadData(f"{path}: `{key}` is {value}; no network has more than {MOST_PARAMETERS}")


def _existing_folder(path: Path) -> Path:
    if not path.is_dir():
        raise BadData(f"{path}: no such folder; a model is a diffusers folder on this machine")
    return path


def _check_names_and_shapes(folder: Path, net: nn.Module, headers: Mapping[Path, Header]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    stored = {name: info.shape for h in headers.values() for name, info in h.tensors.items()}
    problems = []
    if missing := sorted(wanted.keys() - stored.keys()):
        problems.append(f"missing: {_some(missing)}")
    if unexpected := sorted(stored.keys() - wanted.keys()):
        problems.append(f"unexpected: {_some(unexpected)}")
    if misshapen := [
        f"{name} is {list(stored[name])}, not {list(wanted[name])}"
        for name in sorted(wanted.keys() & stored.keys())
        if stored[name] != wanted[name]
    ]:
        problems.append(f"wrong shape: {_some(misshapen)}")
    if problems:
        raise BadData(f"{folder}: the weights do not fit config.json; {'; '.join(problems)}")


def _read_tensors(
    path: Path, names: Iterable[str], dtype: Literal["stored"] | torch.dtype
) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in names}
    if isinstance(dtype, torch.dtype):
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    return tensors


def _some(names: Collection[str]) -> str:
    """Name a few of many."""
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"

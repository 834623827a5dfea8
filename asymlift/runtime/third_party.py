"""The one door to diffusers, transformers and lpips: what must happen before they are imported."""

import importlib
import logging
import os
import warnings
from types import ModuleType

from asymlift.runtime.torchvision_shim import declare_missing_schemas

# Only what a person asked for is printed; a variable that is already set wins.
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # worker processes fork after tokenizing
}


def prepare() -> None:
    """Make the libraries importable and quiet. Cheap, and may be called again."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Float32 norms under autocast: true on the CPU, slow there, and nothing to act on.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    # Of a class that PRXPipeline is one of.
    warnings.filterwarnings("ignore", "`LoraLoaderMixin` is deprecated")
    logging.getLogger("DeepSpeed").addFilter(_worth_saying)
    declare_missing_schemas()


def _worth_saying(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def library(name: str) -> ModuleType:
    """Import diffusers, transformers or lpips."""
    prepare()
    return importlib.import_module(name)

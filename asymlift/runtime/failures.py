"""What an exception means for a run: no memory left, or other ranks that are gone."""

import torch
import torch.distributed as td

from asymlift.artifacts.files import human_bytes
from asymlift.errors import Unavailable, UserError
from asymlift.runtime import watch
from asymlift.runtime.memory import peak_of_process

NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to")
GONE = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "NCCL",
)


def is_out_of_memory(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in said for words in NO_MEMORY)
    )


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed, as it does when another rank is gone or too late."""
    said = str(error)
    return isinstance(error, td.DistError) or (
        isinstance(error, RuntimeError) and any(words in said for words in GONE)
    )


def out_of_memory(error: BaseException, who: str, advice: str = "") -> UserError:
    """The error to end with: who and where, what was asked for, what was held."""
    said = str(error).strip() or type(error).__name__
    asked = said.splitlines()[0].partition("DefaultCPUAllocator: ")
    return Unavailable(
        f"{who} ran out of memory {watch.last}: {asked[2] or asked[0]}\n"
        f"Held here: {held_memory()}. {advice or 'Try a smaller finetune.micro_batch first.'}"
    )


def held_memory() -> str:
    """What this process holds, in words."""
    held = f"at most {human_bytes(peak_of_process())} of the machine's memory so far"
    if not torch.cuda.is_available():
        return held
    free, total = torch.cuda.mem_get_info()
    in_use = torch.cuda.memory_allocated()
    return (
        f"{human_bytes(in_use)} in tensors of {human_bytes(total)} on the GPU "
        f"({human_bytes(free)} free), {held}"
    )

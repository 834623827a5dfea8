"""How a finetune may start: the options of its command, its share of the batch, its lock."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from asymlift.artifacts.files import exclusive_lock, writing
from asymlift.errors import BadRecipe
from asymlift.recipe import FinetuneSection
from asymlift.runtime import dist
from asymlift.runtime.dist import Ranks
from asymlift.runtime.optimizers import check_optimizer
from asymlift.runtime.trackers import check_trackers

AUTO, NONE = "auto", "none"  # what --resume takes beside a path


@dataclass(frozen=True)
class Start:
    """What a command adds to the recipe."""

    resume: str = AUTO  # or `none`, or the path of a checkpoint
    allow_changes: bool = False  # go on also where the recipe trains something else by now
    rehearse: bool | None = None  # None: on a GPU


def check_packages(settings: FinetuneSection) -> None:
    """Refuse what asks for a package that is not installed."""
    check_trackers(settings.trackers)
    check_optimizer(settings.optimizer.kind)


def accumulation_for(settings: FinetuneSection, ranks: Ranks) -> int:
    at_once = settings.micro_batch * ranks.world
    if settings.batch % at_once:
        raise BadRecipe(
            f"finetune.batch {settings.batch} is not a multiple of micro_batch "
            f"{settings.micro_batch} x {ranks.world} ranks; change one of the three"
        )
    return settings.batch // at_once


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """One finetune per run folder."""
    with ExitStack() as held:

        def lock() -> None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive_lock(folder / ".finetune.lock", "this run"))

        dist.first_does(ranks, lock)
        yield

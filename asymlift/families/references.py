"""Pictures that a model is to go by beside the prompt: how they reach `run`, and who takes them.

They are clean, and may have any sizes. Each is one more tensor of the text, (B, c, h_i q, w_i q),
under a name with its number, since their order counts.
"""

from collections.abc import Sequence

from torch import Tensor

from asymlift.errors import BadRecipe
from asymlift.families.base import Config, Family, ReferencePictures, Text
from asymlift.families.refusals import SAME_NETWORK, is_driven_by


def name_of(number: int) -> str:
    return f"reference_{number}"


def references_of(text: Text) -> list[Tensor]:
    """Return the pictures to go by, in their order; mostly there are none."""
    found: list[Tensor] = []
    while (one := text.get(name_of(len(found)))) is not None:
        assert isinstance(one, Tensor)  # all samples of a batch have pictures of the same sizes
        found.append(one)
    return found


def with_references(text: Text, references: Sequence[Tensor]) -> Text:
    """Return the text with these pictures in place of those of the same numbers."""
    return {**text, **{name_of(number): one for number, one in enumerate(references)}}


def reference_rule(family: Family) -> ReferencePictures:
    """Return what pictures to go by the family takes; BadRecipe, with the reason, if none."""
    if isinstance(family.references, str):
        said = f"{family.name} takes no reference pictures: {family.references}"
        raise BadRecipe(f"{said}; leave them out")
    return family.references


def check_references(family: Family, model_index: Config) -> None:
    """Refuse pictures to go by where a checkpoint's pipeline reads them otherwise than `run`."""
    pipeline = str(model_index.get("_class_name", family.pipelines[0]))
    if is_driven_by(family, pipeline):
        return
    drivers = " or ".join(family.pipelines)
    why = f": {SAME_NETWORK[pipeline]}" if pipeline in SAME_NETWORK else ""
    raise BadRecipe(
        f"this model takes no reference pictures here, though {family.name} does: it is made for "
        f"{pipeline}, and they are read as {drivers} does{why}"
    )

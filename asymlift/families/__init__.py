"""The kinds of transformer that asymlift knows: an explicit list."""

import importlib
from difflib import get_close_matches

from asymlift.errors import BadData, BadRecipe
from asymlift.families.anima import ANIMA
from asymlift.families.auraflow import AURAFLOW
from asymlift.families.base import Config, Family
from asymlift.families.bria import BRIA
from asymlift.families.chroma import CHROMA
from asymlift.families.cogview4 import COGVIEW4
from asymlift.families.cosmos import COSMOS
from asymlift.families.ernie import ERNIE
from asymlift.families.fibo import FIBO
from asymlift.families.fibo2 import FIBO2
from asymlift.families.flux1 import FLUX1
from asymlift.families.flux2 import FLUX2
from asymlift.families.flux3 import FLUX3
from asymlift.families.hidream import HIDREAM
from asymlift.families.hunyuanimage import HUNYUANIMAGE
from asymlift.families.ideogram4 import IDEOGRAM4
from asymlift.families.kandinsky5 import KANDINSKY5
from asymlift.families.krea2 import KREA2
from asymlift.families.longcat import LONGCAT
from asymlift.families.lumina2 import LUMINA2
from asymlift.families.lumina_next import LUMINA_NEXT
from asymlift.families.nucleus import NUCLEUS
from asymlift.families.omnigen import OMNIGEN
from asymlift.families.ovis import OVIS
from asymlift.families.prx import PRX
from asymlift.families.qwenimage import QWENIMAGE
from asymlift.families.qwenimage21 import QWENIMAGE21
from asymlift.families.refusals import why_class_refused, why_pipeline_refused
from asymlift.families.sana import SANA
from asymlift.families.sd3 import SD3
from asymlift.families.sit import SIT
from asymlift.families.zimage import ZIMAGE

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        ANIMA,
        AURAFLOW,
        BRIA,
        CHROMA,
        COGVIEW4,
        COSMOS,
        ERNIE,
        FIBO,
        FIBO2,
        FLUX1,
        FLUX2,
        FLUX3,
        HIDREAM,
        HUNYUANIMAGE,
        IDEOGRAM4,
        KANDINSKY5,
        KREA2,
        LONGCAT,
        LUMINA2,
        LUMINA_NEXT,
        NUCLEUS,
        OMNIGEN,
        OVIS,
        PRX,
        QWENIMAGE,
        QWENIMAGE21,
        SANA,
        SD3,
        SIT,
        ZIMAGE,
    )
}


def find_family(name: str, model_index: Config, transformer_config: Config) -> Family:
    """Return a family by name, by `my_package.my_module:MY_FAMILY`, or by the checkpoint (auto)."""
    found = transformer_config.get("_class_name") or _listed_transformer(model_index)
    driven_by = str(model_index.get("_class_name"))
    if found is not None and not isinstance(found, str):
        raise BadData(f"the checkpoint's transformer has a _class_name that is no text: {found!r}")
    if name == "auto":
        return _by_class(found, driven_by)
    family = _imported(name) if ":" in name else _named(name)
    if found and found != family.transformer.rpartition(":")[2]:
        raise BadRecipe(
            f"model.family is {name}, a {family.transformer}, but the checkpoint is a {found}; "
            "use `family: auto`, or another base"
        )
    others = [other for other in _of_class(found) if driven_by in other.pipelines]
    if others and ":" not in name and family not in others:
        raise BadRecipe(
            f"model.family is {name}, but the checkpoint is for {driven_by}, which is of family "
            f"{others[0].name}; use `family: auto`, or another base"
        )
    return family


def family_of_lifted(stated: str, named: str) -> Family:
    """The family of a lifted model, by what it states; code is run only if the recipe names it."""
    if ":" in named:
        return _imported(named)
    if ":" in stated:
        raise BadRecipe(
            f"the model was lifted with family {stated!r}, which is code of its own; "
            f"if you trust it, name it in the recipe, `model.family: {stated}`"
        )
    if named != "auto" and _named(named).name != stated:
        raise BadRecipe(
            f"model.family is {named}, but the model was lifted as {stated}; use `family: auto`, "
            "or convert again under another `name`"
        )
    return _named(stated)


def _listed_transformer(model_index: Config) -> str | None:
    entry = model_index.get("transformer")
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else None


def _of_class(found: str | None) -> list[Family]:
    return [family for family in FAMILIES.values() if family.transformer == found]


def _by_class(found: str | None, driven_by: str) -> Family:
    """The family of a transformer's class; of several, the one whose pipeline drives it."""
    families = _of_class(found)
    driven = [family for family in families if driven_by in family.pipelines]
    if driven or len(families) == 1 or (families and why_pipeline_refused(driven_by)):
        return (driven or families)[0]  # what is refused for its pipeline is told that elsewhere
    if families:
        either = " or ".join(f"{family.name} ({family.pipelines[0]})" for family in families)
        raise BadRecipe(
            f"the checkpoint's transformer, {found}, is of family {either}, and the index names "
            f"neither pipeline but {driven_by}; say which it is, `family: {families[0].name}`"
        )
    if reason := why_class_refused(found):
        raise BadData(f"the checkpoint's transformer is {reason}")
    classes = [family.transformer for family in FAMILIES.values()]
    raise BadRecipe(
        f"no family for the checkpoint's transformer, {found or 'which it does not name'}"
        f"{_suggest(found or '', classes)}; known are {_known()}; "
        "write your own and name it, `family: my_package.my_module:MY_FAMILY`"
    )


def _named(name: str) -> Family:
    if name not in FAMILIES:
        raise BadRecipe(
            f"no family {name!r}{_suggest(name, list(FAMILIES))}; known are {_known()}, "
            "`auto`, or your own, `my_package.my_module:MY_FAMILY`"
        )
    return FAMILIES[name]


def _imported(name: str) -> Family:
    """Import a family that is not ours. A recipe that names one is trusted to run its code."""
    module, _, attribute = name.partition(":")
    try:
        family = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadRecipe(
            f"family {name!r} cannot be imported: {error}; is it installed, or on PYTHONPATH?"
        ) from error
    if not isinstance(family, Family):
        raise BadRecipe(f"family {name!r} is a {type(family).__name__}, not a Family")
    return family


def _suggest(name: str, choices: list[str]) -> str:
    close = get_close_matches(name, choices, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _known() -> str:
    return ", ".join(FAMILIES)

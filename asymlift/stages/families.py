"""Which transformers can be ported, as a table, and what is proven of each."""

from typing import Any

from asymlift.families import FAMILIES
from asymlift.families.base import PROOFS, Family

WIDTH = 180  # of the table, where there is no terminal that has one


def as_json() -> dict[str, Any]:
    return {"proofs": PROOFS, "families": [facts_of(family) for family in FAMILIES.values()]}


def facts_of(family: Family) -> dict[str, Any]:
    sizes = family.sizes
    return {
        "name": family.name,
        "class": family.transformer,
        "pipelines": list(family.pipelines),
        "d": sizes and sizes.d,
        "D": sizes and sizes.D,
        "patch": sizes and sizes.pixel_patch,
        "tier": family.tier,
        "checkpoints": list(family.checkpoints),
        "proven": [proof for proof in PROOFS if proof not in family.unproven],
        "unproven": dict(family.unproven),
        "heavy_text": family.heavy_text,
        "references": not isinstance(family.references, str),
        "needs": dict(family.needs),
    }


def render() -> Any:
    """A rich table, one row a family."""
    from rich.table import Table

    columns = ("family", "transformer", "d/D", "patch", "tier", *PROOFS, "checkpoints")
    table = Table(*columns, box=None, pad_edge=False)
    for family in FAMILIES.values():
        facts = facts_of(family)
        proven = ("-" if proof in family.unproven else "yes" for proof in PROOFS)
        sizes = (f"{facts['d']}/{facts['D']}", str(facts["patch"]), family.tier)
        names = "\n".join(family.checkpoints)
        table.add_row(family.name, family.transformer, *sizes, *proven, names)
    return table


def remarks() -> list[str]:
    """What the columns mean, and whatever is not as it is for most."""
    lines = [f"{proof}: {meaning}" for proof, meaning in PROOFS.items()]
    lines.append("tier: `free` needs nothing of its own, `easy` has a quirk that its module tells")
    takers = [family.name for family in FAMILIES.values() if facts_of(family)["references"]]
    lines.append(f"{', '.join(takers)}: can go by pictures too (`sample --reference`)")
    for family in FAMILIES.values():
        lines += [f"{family.name}, not {proof}: {why}" for proof, why in family.unproven.items()]
        if family.heavy_text:
            lines.append(f"{family.name}: {family.heavy_text}")
        lines += [
            f"{family.name}: its prompts need {package}: pip install '{source}'"
            for package, source in family.needs.items()
        ]
    return lines

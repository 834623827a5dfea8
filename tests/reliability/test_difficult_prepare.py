"""prepare meets difficult inputs: none crashes it, each is accepted or refused as it must be."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.reliability.difficult import Corpus, differ, make_folder, make_shards
from tests.stages.prepare.small_prepare import content, image_in, members, recipe_for, rejected, run

SIZE = {"resize": {"sides": [40]}, "workers": 2}  # 32 x 48 is one of its buckets


def prepared(corpus: Corpus, place: Path, *, tasks: int = 1):
    """PNG and nothing encoded: what is stored is what is judged."""
    source = corpus.paths if corpus.paths[0].suffix == ".tar" else corpus.paths[0].parent
    recipe = recipe_for(
        place, source, data=SIZE, image="png", latents="none", text="none", shard_samples=100
    )
    return [run(recipe, number, tasks) for number in range(tasks)][-1]


def judge(corpus: Corpus, out: Path) -> None:
    found, lines = members(out), rejected(out)
    damaged = {damage.shard for damage in corpus.damages}
    of_cases = [line for line in lines if shard_of(line) not in damaged]
    refused = [case for case in corpus.cases if case.verdict == "refuse"]
    wanted = Counter(case.reason_in_prepare for case in refused)
    assert Counter(line["reason"] for line in of_cases) == wanted
    for case in refused:
        assert any(
            line["reason"] == case.reason_in_prepare
            and case.key in line["sample"]
            and case.shard in line["sample"]
            for line in of_cases
        ), case
        if case.reason_in_prepare != "duplicate key":
            assert case.key not in found, case
    for case in corpus.cases:
        if case.verdict == "accept":
            assert case.agrees(picture(found[case.key])), case.kind
            assert caption(found[case.key]) == case.caption.strip(), case.kind

    plain, careful = dict(corpus.plain), set[str]()
    for damage in corpus.damages:
        plain |= damage.intact
        careful |= {key for key in damage.intact if refused_beside_damage(key, lines)}
        assert not damage.lost & found.keys(), damage.kind
        reasons = {line["reason"] for line in lines if shard_of(line) == damage.shard}
        assert damage.reason in reasons, damage.kind
    assert len(careful) <= 1
    for key, sample in ((key, sample) for key, sample in plain.items() if key not in careful):
        assert differ(sample.picture, picture(found[key])) == 0
        assert caption(found[key]) == sample.caption
    accepted = {case.key for case in corpus.cases if case.verdict == "accept"}
    either = {key for damage in corpus.damages for key in damage.either}
    assert found.keys() - either == (plain.keys() | accepted) - careful


def refused_beside_damage(key: str, lines: list[dict[str, str]]) -> bool:
    """Whole, but without a part that most others have: it may have stood where the damage is."""
    said = [line for line in lines if line["sample"].endswith(f"!{key}")]
    return any(line["detail"].startswith(".json lost, ") for line in said)


def shard_of(line: dict[str, str]) -> str:
    return Path(line["sample"].split("!")[0]).name


def picture(sample: dict[str, bytes]) -> np.ndarray:
    return image_in(sample).permute(1, 2, 0).numpy()


def caption(sample: dict[str, bytes]) -> str:
    return sample.get(".txt", b"").decode()


@pytest.mark.parametrize("make", [make_folder, make_shards])
@pytest.mark.parametrize(
    ("difficult", "plain"),
    [(85, 200), pytest.param(600, 2000, marks=pytest.mark.slow)],
)
def test_every_difficult_input_is_judged_right_by_any_number_of_tasks(
    make, difficult, plain, tmp_path
):
    shape = {} if make is make_folder else {"latent": None}
    corpus = make(tmp_path / "source", difficult=difficult, plain=plain, **shape)
    report = prepared(corpus, tmp_path / "1")
    assert report.complete
    judge(corpus, tmp_path / "1" / "out")
    assert report.num_samples == len(members(tmp_path / "1" / "out"))
    assert report.num_rejected == sum(
        line.get("count", 1) for line in rejected(tmp_path / "1" / "out")
    )
    for tasks in (2, 3):
        again = prepared(corpus, tmp_path / str(tasks), tasks=tasks)
        assert (again.num_samples, again.rejected) == (report.num_samples, report.rejected)
        assert content(tmp_path / str(tasks) / "out") == content(tmp_path / "1" / "out")

"""Recipes: what is refused, and what the refusal says."""

from pathlib import Path

import pytest

from asymlift.errors import BadRecipe, Exit
from asymlift.recipe import Recipe, load_recipe

MINIMAL = "name: tiny\nmodel: {base: some/folder}\ndata: {train: 'train/{000000..000003}.tar'}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(BadRecipe) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit == Exit.BAD_RECIPE
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 4
    return message


def test_a_minimal_recipe_has_the_published_constants(recipe_file):
    recipe = load_recipe(recipe_file)

    loss, optimizer = recipe.finetune.loss, recipe.finetune.optimizer
    assert (loss.weight, loss.shift, loss.sigma_clamp) == (10.0, 0.3, 0.05)
    assert (optimizer.lr, optimizer.betas, optimizer.lr_scale) == (1e-4, (0.9, 0.95), {"last": 10})
    assert (recipe.color.mean, recipe.color.std) == ((0.56, 0.0, 0.01), 0.16)
    assert recipe.finetune.time.shift == 17
    assert recipe.run_folder == Path("runs/tiny")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("finetune.optimzer.lr=1", "unknown key `finetune.optimzer`; did you mean `optimizer`?"),
        ("finetune.train.lora.rnak=3", "`finetune.train.lora.rnak`; did you mean `rank`?"),
        ("zzz=1", "unknown key `zzz`; known here: name, runs, model"),
        ("finetune.steps=1:30", "finetune.steps: input should be a valid integer (given: '1:30')"),
        ("sample.clamp=yes", "sample.clamp: input should be a valid boolean (given: 'yes')"),
        ("finetune.optimizer.lr=abc", "finetune.optimizer.lr: input should be a valid number"),
        (
            "finetune.preview=true",
            "preview: input should be a section: keys with values (given: True)",
        ),
        ("finetune.loss.perceptual.net=vg", "input should be 'vgg', 'alex', 'squeeze' or"),
        ("finetune.loss.perceptual={net: embedded, weights: x}", "brings its own weights"),
        ("finetune.batch=3", "batch 3 is not a multiple of micro_batch 8"),
        ("finetune.train=full", "train: full leaves no frozen weights to share"),
        ("finetune.loss.reference=copy", "loss.reference: copy is for train: full"),
        ("finetune.train={lora: null, modules: []}", "nothing trains"),
        ("finetune.zero.stage=4", "finetune.zero.stage: input should be less than or equal to 3"),
        ("finetune.zero={stage: 0, offload: optimizer}", "stage 0 partitions nothing"),
        ("finetune.zero={stage: 2, offload: all}", "offload: all needs stage 3"),
        ("sample.renorm=true", "renorm: true takes the place of `orthogonal`"),
        ("finetune={optimizer: {kind: adamw_8bit}, zero: {offload: optimizer}}", "use kind: adamw"),
        ("finetune={compile: true, zero: {stage: 3}}", "compile: at zero.stage 3 weights come"),
        ("finetune.optimizer.kind=lion", "input should be 'adamw', 'adamw_8bit' or 'muon'"),
        ("finetune.optimizer.kind=muon", "kind: muon is for matrices inside the transformer's"),
        ("finetune.trackers=[wandb, wandb]", "finetune.trackers: each tracker once"),
        ("finetune.optimizer.momentum=1", "optimizer.momentum: input should be less than 1"),
        ("color.mean=fit", "mean and std are both numbers, or both `fit`"),
        ("name=a/b", "name: `a/b` becomes a folder"),
        ("finetune.optimizer.lr_scale={lsat: 10}", "`lsat` names no part of the model; use one of"),
        (
            "finetune.optimizer.betas=[2, 3]",
            "finetune.optimizer.betas.0: input should be less than",
        ),
        (
            "finetune.optimizer.betas=[a, 0.9]",
            "betas.0: input should be a valid number (given: 'a')",
        ),
        ("finetune.optimizer.lr=1e400", "finetune.optimizer.lr: input should be a finite number"),
        ("sample.guidance=1e400", "sample.guidance: input should be a finite number"),
        ("model.base=''", "model.base: string should have at least 1 character"),
        ("data.mode=random", "data.mode: input should be 'exact' or 'stream' (given: 'random')"),
        ("data.text=always", "data.text: input should be 'auto', 'cached' or 'online'"),
        ("data.captions.lines=true", "unknown key `data.captions`; did you mean `caption`?"),
        ("data.resize.side=512", "unknown key `data.resize.side`; did you mean `sides`?"),
        ("data.resize.sides=[]", "data.resize.sides: give at least one (given: [])"),
        ("data.resize.sides=512", "data.resize.sides: input should be a valid list (given: 512)"),
        ("data.resize.sides=[512, 0]", "data.resize.sides.1: input should be greater than 0"),
        ("data.resize.sides=[512.5]", "data.resize.sides.0: input should be a valid integer"),
        ("data.resize.max_aspect=0.5", "max_aspect: input should be greater than or equal to 1"),
        ("data.resize.min_side=-1", "data.resize.min_side: input should be greater than 0"),
        ("data.resize.upscale=1", "data.resize.upscale: input should be a valid boolean"),
        ("data.caption.source=classes", "source: input should be 'caption', 'label' or 'class'"),
        ("data.caption.choice=last", "choice: input should be 'first', 'random' or 'longest'"),
        ("data.caption.labels=''", "data.caption: labels: `folder`, or the name of a column"),
        ("data.caption.line=true", "unknown key `data.caption.line`; did you mean `lines`?"),
        ("data.train=3", "data.train: input should be a valid string (given: 3)"),
        ("prepare.source=photos", "`prepare.out` is missing"),
        ("prepare={source: photos, out: ''}", "prepare.out: string should have at least 1"),
        ("prepare={source: photos, out: o, ltents: none}", "did you mean `latents`?"),
        ("prepare={source: photos, out: o, quality: 101}", "quality: input should be less than"),
        ("prepare={source: photos, out: o, text: int8}", "prepare.text: input should be 'none',"),
        ("nonsense", "--set nonsense: expected section.key=value"),
        ("name=[1", "--set name=[1: while parsing"),
    ],
)
def test_a_wrong_value_is_refused_and_named(recipe_file, override, said):
    assert said in refusal(recipe_file, override)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL + "name: again\n", "line 4: `name` is given twice"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases (*name) are not allowed"),
        ("1: 2\n", "line 1: key 1 is no word"),
        ("- 1\n", "a recipe is a mapping of sections, not list"),
        ("name: x\ndata: {train: a}\n", "`model` is missing"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ],
)
def test_yaml_without_surprises(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert said in refusal(path)


def test_muon_is_for_what_may_hold_matrices(recipe_file):
    """Whether a named module holds some, the model says."""
    for override in (
        "finetune={optimizer: {kind: muon}, train: full, loss: {reference: copy}}",
        "finetune={optimizer: {kind: muon}, train: {modules: [last, blocks.0.attn]}}",
    ):
        assert load_recipe(recipe_file, [override]).finetune.optimizer.kind == "muon"


def test_words_and_numbers_are_what_they_look_like(recipe_file):
    recipe = load_recipe(recipe_file, ["finetune.optimizer.lr=1e-4", "model.family=no"])

    assert recipe.finetune.optimizer.lr == 1e-4
    assert recipe.model.family == "no"  # YAML 1.1 would say False


def test_pictures_need_no_settings(recipe_file):
    data = load_recipe(recipe_file).data

    assert (data.mode, data.text, data.caption.source) == ("exact", "auto", "caption")
    assert (data.resize.sides, data.resize.step, data.resize.upscale) == ([1024], None, False)
    assert load_recipe(recipe_file).prepare is None


def test_overrides_reach_into_sections_that_are_not_written(recipe_file):
    recipe = load_recipe(recipe_file, ["finetune.zero.stage=3", "sample.shift=4.0"])

    assert (recipe.finetune.zero.stage, recipe.sample.shift) == (3, 4.0)


def test_a_missing_and_an_unreadable_recipe(tmp_path):
    assert "no such recipe" in refusal(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "bytes.yaml")


def test_many_mistakes_are_counted(recipe_file):
    wrong = [f"sample.{key}=x" for key in ("steps", "guidance", "orthogonal", "height", "batch")]

    assert "and 2 more" in refusal(recipe_file, *wrong)


def test_a_recipe_never_changes(recipe_file):
    recipe = load_recipe(recipe_file)

    with pytest.raises(Exception, match="frozen"):
        recipe.name = "other"
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_mistake_inside_a_section_is_the_only_one_that_is_told(recipe_file):
    said = refusal(recipe_file, "finetune.train={lora: {rank: 0}}")

    assert said.count("\n") == 0
    assert "finetune.train.lora.rank: input should be greater than 0" in said

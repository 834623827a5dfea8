import json

import pytest
import torch

from asymlift.embedded import IMAGE_SIZE, MODELS, TEXT_LENGTH
from asymlift.embedded.scenes import all_labels, caption
from asymlift.runtime import third_party

FOLDER = MODELS["tiny"].parent
LIMIT = 12 * 2**20


@pytest.fixture(scope="module", params=MODELS)
def pipeline(request):
    diffusers = third_party.library("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        MODELS[request.param], local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(pipeline, prompts):
    return pipeline.encode_prompt(prompts, "cpu", max_sequence_length=TEXT_LENGTH)[0]


def test_the_folder_is_a_klein_pipeline_that_generates(pipeline):
    images = pipeline(
        prompt=[caption(row) for row in all_labels()[:4]],
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=4,
        guidance_scale=2.0,
        max_sequence_length=TEXT_LENGTH,
        output_type="pt",
    ).images

    assert type(pipeline).__name__ == "Flux2KleinPipeline"
    assert images.shape == (4, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert images.isfinite().all()
    assert (images.std((1, 2, 3)) > 0.05).all()  # not flat


def test_every_part_loads_in_float32(pipeline):
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder)

    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_each_word_of_a_caption_is_one_known_token(pipeline):
    tokenizer = pipeline.tokenizer
    for row in all_labels()[::37]:
        words = caption(row).split()
        ids = tokenizer(caption(row))["input_ids"]
        assert [tokenizer.decode([i]).strip() for i in ids] == words
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    "prompt", ["", "A big wooden house, 1950", "\u6771\u4eac \u00e9", "x " * 99]
)
def test_any_prompt_can_be_encoded(pipeline, prompt):
    embeddings = encode(pipeline, [prompt])

    assert embeddings.shape == (1, TEXT_LENGTH, pipeline.transformer.config.joint_attention_dim)
    assert embeddings.isfinite().all()


def test_captions_keep_apart_after_encoding(pipeline):
    captions = [caption(row) for row in all_labels()[::29]]
    embeddings = encode(pipeline, captions).flatten(1)

    assert torch.cdist(embeddings, embeddings).fill_diagonal_(9e9).min() > 1


def test_latents_are_normalised_by_the_statistics_of_the_vae(pipeline):
    from asymlift.embedded.build import encode_tokens
    from asymlift.embedded.scenes import make_scenes

    z0 = encode_tokens(pipeline.vae, make_scenes(range(256), seed=1, size=IMAGE_SIZE).image)

    assert z0.mean((0, 1)).abs().max() < 0.2
    assert (z0.std((0, 1)) - 1).abs().max() < 0.15


def test_the_text_table_gives_each_sample_its_own_caption(pipeline):
    from asymlift.embedded.build import text_table

    labels = all_labels()[[5, 1000, 2879]]
    table, rows, text_ids = text_table(pipeline, labels)

    expected = encode(pipeline, [caption(row) for row in labels])
    torch.testing.assert_close(table[rows], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(table[-1:], encode(pipeline, [""]), rtol=1e-4, atol=1e-5)
    assert text_ids.shape == (TEXT_LENGTH, 4)


def test_the_embedded_files_are_small_and_hold_no_code():
    files = [
        p for name in (*MODELS, "feature_nets") for p in (FOLDER / name).rglob("*") if p.is_file()
    ]

    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt"}
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.suffix != ".pyc") <= LIMIT
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in files)  # readable once installed


def test_no_file_says_where_it_was_built():
    for path in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in path.read_text()


@pytest.mark.parametrize("name", MODELS)
def test_the_measured_summary_is_there(name):
    summary = json.loads((MODELS[name] / "build.json").read_text())

    assert summary["alignment"]["r2"] > 0.65
    assert summary["real"]["accuracy"] > summary["latent_base"]["accuracy"]


def test_the_weak_vae_is_weak_and_the_good_one_is_not():
    weak, good = (json.loads((MODELS[n] / "build.json").read_text()) for n in MODELS)

    assert 18.5 < weak["vae_psnr"] < 20.5 and weak["vae_high_frequency"] < 0.5
    assert good["vae_psnr"] > 22.5 and good["vae_high_frequency"] > 0.75

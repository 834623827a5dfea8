"""Secrets do not leave, and what is no secret stays as it is."""

import time
from pathlib import Path

import pytest

from asymlift.redact import redacted, redacted_values

SECRET = "canary-5f1e9d"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"https://me:{SECRET}@host/a.tar", "https://***@host/a.tar"),
        (f"s3://{SECRET}@host/a.tar: not found", "s3://***@host/a.tar: not found"),
        (f"https://h/{{0..9}}.tar?X-Amz-Signature={SECRET}&b=1", "https://h/{0..9}.tar?***"),
        (f'pipe:curl -H "Authorization: Bearer {SECRET}" u', 'curl -H "Authorization: ***" u'),
        (f"pipe:curl -H 'X-Api-Key: {SECRET}' u", "'X-Api-Key: ***' u"),
        (f"curl -H Authorization:Bearer\\ {SECRET} u", "Authorization:***"),
        (f"curl -u me:{SECRET} https://h/a.tar", "curl -u *** https://h/a.tar"),
        (f"curl --user=me:{SECRET} x", "curl --user=*** x"),
        (f"tool --access-token {SECRET} x", "tool --access-token *** x"),
        (f"AWS_SECRET_ACCESS_KEY={SECRET} aws s3 cp", "AWS_SECRET_ACCESS_KEY=*** aws s3 cp"),
        (f"Client(token='{SECRET}')", "Client(token='***')"),
        ("hf_" + "a1B2" * 6 + " is refused", "*** is refused"),
        ("key AKIA" + "Z" * 16, "key ***"),
        ("ghp_" + "z" * 30, "***"),
    ],
)
def test_a_secret_goes_and_the_rest_stays(text, left):
    assert SECRET not in redacted(text)
    assert left in redacted(text)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PASSWORD"])
def test_what_the_environment_keeps_secret_is_found_in_any_text(name, monkeypatch):
    monkeypatch.setenv(name, SECRET)
    assert redacted(f"401 for [{SECRET}]") == "401 for [***]"


@pytest.mark.parametrize(
    "text",
    [
        "latent token: 12 numbers, token order: c p q in",
        "next: asymlift convert r.yaml --set basis.tokens_per_image=64",
        "shards/train/{000000..000119}.tar, a?.tar and pictures/?*.jpg",
        "pipe:aws s3 cp s3://bucket/{000..119}.tar -",
        "hf download org/model; see https://github.com/a/b/issues/1",
        "tokenizer_config.json: Qwen2Tokenizer, secretary.png, user@host.org",
        "sha256:" + "ab" * 32,
    ],
)
def test_what_is_no_secret_is_left_alone(text, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "tokenizer_config")
    monkeypatch.setenv("SSH_KEY", "org")
    assert redacted(text) == text


@pytest.mark.parametrize("piece", ["a-", "a://", "x", " --a", "token", "https://a@", " -u a"])
def test_no_text_takes_long(piece):
    started = time.process_time()
    redacted(piece * (50_000 // len(piece)))
    assert time.process_time() - started < 2


def test_documents_are_cleaned_all_through():
    path = Path("/data/a.tar")
    url = f"https://me:{SECRET}@h/a"
    document = {"a": [url, {url: (1, None)}], "b": path, "c": 1.5, "d": True}
    assert redacted_values(document) == {
        "a": ["https://***@h/a", {"https://***@h/a": [1, None]}],
        "b": "/data/a.tar",
        "c": 1.5,
        "d": True,
    }

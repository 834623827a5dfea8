"""The tiny text side: a real Qwen2 tokenizer over the captions, and a random Qwen3 encoder.

Every known word is one token and every other string falls apart into bytes, so nothing is unknown.
The encoder is never trained: random layers still tell captions apart, which is all the transformer
needs, as it learns what each embedding means.
"""

import json

import torch
from tokenizers.pre_tokenizers import ByteLevel

from asymlift.embedded import TEXT_LENGTH
from asymlift.embedded.scenes import all_labels, caption
from asymlift.runtime import third_party

third_party.prepare()

from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Two marks and the caption: an empty caption still leaves tokens to attend to, or the mask is all
# zero and the encoder answers with NaN.
CHAT_TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message.content }}" + END + "{% endfor %}"
)
HIDDEN = 32  # the pipeline stacks three layers: 96 numbers per token
LAYERS = 28  # it reads the hidden states after 9, 18 and 27, before the final norm


def make_tokenizer() -> Qwen2TokenizerFast:
    """Return a byte-level tokenizer trained until each word of the captions is one token."""
    bare = Qwen2TokenizerFast()
    trained = bare.train_new_from_iterator(
        [caption(row) for row in all_labels()],
        vocab_size=1024,  # more than there is to merge: every word ends as one token
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        padding_side="right",
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    longest = len(tokenizer(START + caption(all_labels()[-1]) + END)["input_ids"])
    assert longest <= TEXT_LENGTH, f"{longest} tokens do not fit in {TEXT_LENGTH}"
    return tokenizer


def make_text_encoder(vocab_size: int, *, seed: int) -> Qwen3ForCausalLM:
    """Return a frozen random encoder whose embeddings keep unit size over its layers."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        max_window_layers=LAYERS,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    encoder = Qwen3ForCausalLM(config)
    for name, weight in encoder.named_parameters():
        if "embed_tokens" in name:
            weight.data.normal_()
        elif weight.ndim == 2:
            # Each layer adds a little context (12 % of the size), so the words stay readable.
            weight.data.normal_(std=0.35 / weight.shape[1] ** 0.5)
    return encoder.eval().requires_grad_(False)

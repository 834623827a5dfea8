"""Tiny text encoders and tokenizers of the real classes, as pipelines take them."""

from typing import Any

from asymlift.runtime import third_party
from tests.families.case import WORDS, seeded

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SEED = 5


def random_model(kind: str, config: Any) -> Any:
    """A model of transformers with weights large enough that prompts differ."""
    net = seeded(lambda: getattr(third_party.library("transformers"), kind)(config), SEED)
    return seeded(lambda: widened(net), SEED)


def widened(net: Any) -> Any:
    for weight in net.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.3)  # 0.02, the default, leaves prompts alike
    return net


def byte_tokenizer(*more: str) -> Any:
    """Qwen's tokenizer, a token for each byte; `more` are further special ones."""
    from tokenizers.pre_tokenizers import ByteLevel

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*marks, *sorted(ByteLevel.alphabet()), *more]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = third_party.library("transformers").Qwen2TokenizerFast(
        vocab=vocabulary,
        merges=[],
        pad_token=marks[0],
        eos_token=marks[2],
        additional_special_tokens=[marks[1], *more],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    return tokenizer


def qwen3(hidden: int, layers: int, head: str) -> dict[str, Any]:
    """Qwen3 and its tokenizer: `text_encoder` and `tokenizer`."""
    tokenizer = byte_tokenizer()
    config = third_party.library("transformers").Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return {"text_encoder": random_model(head, config), "tokenizer": tokenizer}


def qwen2_5_vl(hidden: int, layers: int = 2) -> Any:
    """Qwen2.5-VL, whose eye is as small as it goes."""
    transformers = third_party.library("transformers")
    sections = [hidden // 4 - 2 * (hidden // 12), hidden // 12, hidden // 12]  # half a head's width
    text = {
        "vocab_size": len(byte_tokenizer()),
        "hidden_size": hidden,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4},
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    eye = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=eye)
    return random_model("Qwen2_5_VLForConditionalGeneration", config)


def clip_tokenizer() -> Any:
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    return third_party.library("transformers").CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16
    )


def clip(width: int, head: str = "CLIPTextModelWithProjection", length: int = 16) -> Any:
    """CLIP's text model, which reads so many words."""
    config = third_party.library("transformers").CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return random_model(head, config)


def t5_tokenizer() -> Any:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    words += [(letter, -3.0) for letter in LETTERS]
    return third_party.library("transformers").T5TokenizerFast(vocab=words, extra_ids=0)


def t5(width: int = WORDS, kind: str = "T5", vocabulary: int = 4 + len(LETTERS)) -> Any:
    config = getattr(third_party.library("transformers"), f"{kind}Config")(
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2
    )
    return random_model(f"{kind}EncoderModel", config)


def glm(hidden: int) -> Any:
    """GLM-4, of which CogView4 reads the last layer but one."""
    config = third_party.library("transformers").GlmConfig(
        vocab_size=4 + len(LETTERS),
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return random_model("GlmModel", config)


def mistral3(hidden: int) -> Any:
    """Mistral 3, whose eye is as small as it goes; ERNIE-Image reads the last layer but one."""
    text = {
        "model_type": "mistral",
        "vocab_size": len(byte_tokenizer()),
        "hidden_size": hidden,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    eye = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = third_party.library("transformers").Mistral3Config(text_config=text, vision_config=eye)
    return random_model("Mistral3Model", config)


def smollm3(hidden: int, layers: int) -> Any:
    """SmolLM3, whose vocabulary reaches the word that stands for no prompt at all, 128000."""
    config = third_party.library("transformers").SmolLM3Config(
        vocab_size=128001,
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return random_model("SmolLM3ForCausalLM", config)


def qwen3_vl(
    hidden: int, layers: int, head: str = "Qwen3VLForConditionalGeneration", *more: str
) -> dict[str, Any]:
    """Qwen3-VL, whose eye is as small as it goes, and its processor; `more` tokens than usual."""
    transformers, tokenizer = third_party.library("transformers"), byte_tokenizer(*more)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    eye = {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 4,
    }
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen3VLVideoProcessor()
    )
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=eye)
    return {"text_encoder": random_model(head, config), "processor": processor}


def talking_qwen3_vl(hidden: int, layers: int) -> dict[str, Any]:
    """Qwen3-VL whose processor is asked to write chats, and counts pictures in them."""
    head, sights = "Qwen3VLForConditionalGeneration", ("<|image_pad|>", "<|video_pad|>")
    parts = qwen3_vl(hidden, layers, head, *sights)
    parts["processor"].chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
        "{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    return parts


def gemma_tokenizer() -> Any:
    """A token for each letter."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS]
    return third_party.library("transformers").GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, add_bos_token=True
    )


def gemma2(hidden: int, layers: int) -> dict[str, Any]:
    return gemma(hidden, layers, "Gemma2", query_pre_attn_scalar=8)


def gemma(hidden: int, layers: int, kind: str = "Gemma", **config: Any) -> dict[str, Any]:
    """Gemma and its tokenizer: `text_encoder` and `tokenizer`."""
    tokenizer = gemma_tokenizer()
    sizes = getattr(third_party.library("transformers"), f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **config,
    )
    return {"text_encoder": random_model(f"{kind}Model", sizes), "tokenizer": tokenizer}


def llama(hidden: int, layers: int) -> Any:
    """Llama, of which HiDream reads every layer."""
    config = third_party.library("transformers").LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return random_model("LlamaForCausalLM", config)


def t5gemma(hidden: int, length: int) -> dict[str, Any]:
    """T5Gemma's encoder, whose prompts are cut at so many words, and its tokenizer."""
    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = length
    third_party.library("transformers")
    from transformers.models.t5gemma import configuration_t5gemma, modeling_t5gemma

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},  # not the default
    }
    config = configuration_t5gemma.T5GemmaConfig(encoder=sizes, decoder=sizes).encoder
    encoder = seeded(lambda: modeling_t5gemma.T5GemmaEncoder(config), SEED)
    return {"text_encoder": seeded(lambda: widened(encoder), SEED), "tokenizer": tokenizer}

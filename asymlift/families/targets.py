"""Paths of linear maps that classes of the FLUX kind share, for LoRA: as published for FLUX.2."""

# Blocks of two streams, of the picture and of words.
DOUBLE_BLOCKS = (
    "transformer_blocks.*.ff.net.0.proj",
    "transformer_blocks.*.ff.net.2",
    "transformer_blocks.*.ff_context.net.0.proj",
    "transformer_blocks.*.ff_context.net.2",
    "transformer_blocks.*.attn.to_out.0",
)
# Blocks of one, whose last map takes both attention and MLP.
SINGLE_BLOCKS = ("single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out")

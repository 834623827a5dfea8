"""The tiny model that ships with asymlift, so that every command runs on a CPU in minutes.

`tiny` is a complete FLUX.2-klein pipeline folder for 32 x 32 scenes (scenes.py). Its VAE is
DELIBERATELY WEAK: trained short, it loses textures and letters, so a pixel model finetuned from it
beats it clearly. That shows the machinery; it is no evidence about real VAEs. For an honest
comparison use `tiny-good-vae`: same data, same sizes, a VAE trained for much longer.

`python -m asymlift.embedded.build OUT_DIR --variant weak` made `tiny` from seed 0, with the feature
nets that are here. Those nets, and the VAE of `tiny-good-vae`, come from an earlier program; the
build makes their kind too. It leads a VAE to a code that a linear basis fits, so an R2 of 0.9 is
by construction and says nothing about real VAEs, either.
"""

from pathlib import Path

HERE = Path(__file__).parent

MODELS = {"tiny": HERE / "tiny", "tiny-good-vae": HERE / "tiny-good-vae"}
PERCEPTUAL_NET = HERE / "feature_nets" / "perceptual.safetensors"  # may enter a loss
METRICS_NET = HERE / "feature_nets" / "metrics.safetensors"  # must never enter a loss

IMAGE_SIZE = 32
TEXT_LENGTH = 12  # max_sequence_length for encode_prompt: 9 words, start, end, one spare

# Measured on scenes 0 to 4095 of seed 0, values in [0, 1]; a basis is fitted on their difference
# from the mean, over the deviation.
PIXEL_MEAN = (0.407, 0.412, 0.409)
PIXEL_STD = 0.2475

"""asymlift turns a latent flow image model into a pixel-space model."""

__version__ = "0.1.0"

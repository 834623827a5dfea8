"""Shards of images, captions, latents and text embeddings."""

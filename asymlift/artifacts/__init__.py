"""The files that asymlift writes and reads: safetensors and JSON, never pickle."""

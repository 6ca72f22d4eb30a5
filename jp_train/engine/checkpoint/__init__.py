"""Checkpoints that are complete or absent: safetensors, one file a rank, nothing pickled."""

"""Hugging Face and torch_dist checkpoints, file to file."""

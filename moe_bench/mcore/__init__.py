"""The only door to Megatron."""

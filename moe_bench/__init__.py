"""A Megatron-Core MoE training and benchmarking harness."""

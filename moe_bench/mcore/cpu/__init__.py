"""The CPU embedding: what lets Megatron's own code train where no GPU is."""

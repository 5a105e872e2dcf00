"""What a run will cost: parameters, FLOPs, memory."""

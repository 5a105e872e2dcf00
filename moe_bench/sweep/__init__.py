"""Many points of one run: planned, pruned, run one after another or as job arrays."""

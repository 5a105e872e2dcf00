"""Where ranks and layers sit: parallel groups and pipeline stages."""

"""How many ranks a layout needs, and which layers each pipeline stage holds."""

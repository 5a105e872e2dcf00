"""From a resolved run to Megatron's argv: flags per release, derived choices, rules."""

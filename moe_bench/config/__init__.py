"""Layered files, environment and flags, folded into one resolved run."""

"""Render a launch and submit it: local, Slurm, Kubernetes."""

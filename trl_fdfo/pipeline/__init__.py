"""Sampling from a diffusers pipeline, and replay of its steps."""

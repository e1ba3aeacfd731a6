"""Checkpoints, adapters, the Hub."""

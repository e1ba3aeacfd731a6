"""Evaluations: images of prompts scored by rewards, control rewards and diversity."""

"""Reinforce Adjoint Matching (arXiv 2605.10759)."""

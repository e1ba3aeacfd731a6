"""Advantage Weighted Matching (arXiv 2509.25050)."""

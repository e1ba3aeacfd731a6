"""Finite Difference Flow Optimization (arXiv 2603.12893)."""

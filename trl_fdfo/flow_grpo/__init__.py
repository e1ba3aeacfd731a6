"""Flow-GRPO (arXiv 2505.05470), the baseline."""

"""DiffusionNFT (arXiv 2509.16117)."""

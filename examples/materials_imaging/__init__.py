"""Materials from diffraction patterns by FC-DenseNet (Laanait et al., arXiv 1909.11150)."""

"""Inverse problems with model-aware Jacobian regularisation (Amjad et al., arXiv 1901.11352)."""

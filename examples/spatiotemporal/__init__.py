"""Bayesian Neural Fields (Saad et al., arXiv 2403.07657)."""

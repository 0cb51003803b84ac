"""Deep learning for imaging by what is known of the operator (Ongie et al., arXiv 2005.06001)."""

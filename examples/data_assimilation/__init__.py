"""Deep Bayesian Filtering (Tarumi et al., arXiv 2405.18674)."""

"""The gradient noise scale (McCandlish et al., arXiv 1812.06162)."""

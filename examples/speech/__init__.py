"""Deep Speech 2 (Amodei et al., arXiv 1512.02595)."""

"""Sums, products, factors, systems and inverses of matrices in blocks, each with its error."""

"""Hierarchical low-rank matrices whose results carry an error bound that holds."""

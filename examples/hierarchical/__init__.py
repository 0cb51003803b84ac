"""Spatial regression by a Gaussian process whose likelihood comes with an error bound."""

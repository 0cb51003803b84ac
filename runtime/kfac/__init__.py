"""Curvature of weights at run time: statistics, their refreshes, and what is solved with them."""

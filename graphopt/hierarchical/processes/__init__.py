"""Gaussian processes on kernel matrices: HODLR factors, what they tell, and likelihoods."""

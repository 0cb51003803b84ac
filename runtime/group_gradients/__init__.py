"""Reduce gradients over ranks as a plan says."""

"""Graphs and what was done to them, for people; only the command line uses these modules."""

"""Trainers of other packages, without graphopt and with it."""

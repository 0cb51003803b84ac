"""Example programs; those that are packages are installed with graphopt (extra `examples`)."""

"""graphopt passes in a package of their own."""

"""A graphopt pass in a package of its own."""

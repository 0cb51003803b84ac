"""What messages cost: curves, algorithms of collectives, named clusters. Pure formulas, no torch."""

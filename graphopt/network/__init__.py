"""What messages cost: curves, collectives, clusters. Pure formulas, no torch."""

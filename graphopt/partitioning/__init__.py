"""Which operators form which stage of a pipeline: exact search, fallback, bounds and baselines."""

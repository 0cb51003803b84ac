"""Which gradients are reduced together: the planner, its search and its baselines."""

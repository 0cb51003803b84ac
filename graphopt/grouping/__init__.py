"""Which gradients travel together: the planner, its search, and what it is weighed against."""

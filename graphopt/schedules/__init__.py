"""Pipeline schedules as lists of actions: their laws, generators, checks and text forms."""

"""The optimized model: the user's own object, what runs its calls, and what is told about it."""

"""Makes the specialisations of a model: the only place where capture, passes and runtime meet."""

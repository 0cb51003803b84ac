"""The runtime obeys a plan and decides nothing."""

if __name__ != "graphopt.runtime":  # a second copy under another name would hold its own state
    raise ImportError(f"import graphopt.runtime, not {__name__}")

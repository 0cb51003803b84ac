"""The passes: one pass, one file, one idea."""

if __name__ != "graphopt.passes":  # a second copy under another name would hold its own classes
    raise ImportError(f"import graphopt.passes, not {__name__}")

"""Values that are computed once and kept until a weight they depend on changes."""

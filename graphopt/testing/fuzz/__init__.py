"""A differential fuzzer over daily training code: PyTorch eager against `graphopt.optimize`."""

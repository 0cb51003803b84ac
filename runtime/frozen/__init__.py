"""What is computed once and kept while the weights it came from stay as they are."""

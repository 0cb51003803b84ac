"""Large batches: warm-up by RMSprop (Akiba et al., arXiv 1711.04325), and batches that grow."""

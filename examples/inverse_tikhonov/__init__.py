"""mcDNN and TNet: networks as Tikhonov solvers (Nguyen and Bui-Thanh, arXiv 2105.12033)."""

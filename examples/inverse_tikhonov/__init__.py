"""mcDNN and TNet: networks that solve Tikhonov problems (Nguyen et al., arXiv 2105.12033)."""

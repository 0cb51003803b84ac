"""mcDNN and TNet: networks that solve Tikhonov problems (Nguyen and Bui-Thanh, arXiv 2105.12033)."""

"""K-pairwise maximum entropy models of neural populations (Tkačik et al., 2014)."""

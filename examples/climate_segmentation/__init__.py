"""Storms and atmospheric rivers as pixels of climate fields (Kurth et al., SC18)."""

"""Inverse problems with an unknown operator, by U-nets (del Álamo, 2023)."""

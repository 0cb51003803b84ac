"""What graphopt refuses, as examples: they are tested, and the table of the limits is made of them.

``python -m tests.support.refusals`` writes the tables into ``docs/limits.md``.
"""

"""Captures that a later process finds again: `.gopt` text and JSON, never code.

What is written holds the joint graph, every condition under which Dynamo took the call, with
fingerprints of all code, classes and values behind them, where the inputs of the graph are found,
and what forward returns. What is read counts for a call only if all of it fits.
"""

from graphopt.capture.kept.entry import Behind, Entry, described, entry_of, found
from graphopt.capture.kept.fingerprints import Unkept
from graphopt.capture.kept.key import key_of
from graphopt.capture.kept.operators import own_operators_only
from graphopt.capture.kept.sizes import Varying
from graphopt.capture.kept.sources import Misfit, Unreadable
from graphopt.capture.kept.store import Found, Store
from graphopt.capture.kept.varied import all_sizes, note_symbols, symbols_of_earlier

__all__ = [
    "Behind",
    "Entry",
    "Found",
    "Misfit",
    "Store",
    "Unkept",
    "Unreadable",
    "Varying",
    "all_sizes",
    "described",
    "entry_of",
    "found",
    "key_of",
    "note_symbols",
    "own_operators_only",
    "symbols_of_earlier",
]

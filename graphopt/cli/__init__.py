"""The command line: one module per command, answers on stdout, progress on stderr.

No module here imports torch when it is loaded, so that ``--help`` answers at once: what a command
needs is imported where it runs.
"""

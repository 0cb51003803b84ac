"""The ranks of a running job: how they agree, send and report failures."""

"""Checkpoints of other code bases in."""

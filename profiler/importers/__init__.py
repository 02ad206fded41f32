"""Readers of other projects' published kernel tables."""

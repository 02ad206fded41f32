"""Measuring kernel times with the live runtime's own layers: the only part of the profiler that needs torch.

`points`, `grid`, `store`, `session` and `refine` decide what is measured when, and need no torch;
`cases` and what it imports do the measuring.
"""

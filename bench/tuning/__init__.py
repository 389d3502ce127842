"""Finds the fastest block sizes of a model's operations on this GPU: `python -m ia3rt.bench tune`.

A file an operation says which shapes a model has of it, which configs may be the fastest for one, and how it is run.
ahead.py builds the kernels of all of these in many processes, which takes longest; search.py times them, one at a time.
"""

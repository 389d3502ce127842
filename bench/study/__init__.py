"""Which way of combining IA³ adapters keeps the most of each: trained, combined, tested and written down by a command.

`python -m ia3rt.bench study` does it all and writes docs/combining.md.
"""

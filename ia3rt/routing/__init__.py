"""What the rows of a forward wear: the route, and what each backend reads of it, in `generate` and in training too.

Nothing here knows how a module applies a vector. It may import `adapters`.
"""

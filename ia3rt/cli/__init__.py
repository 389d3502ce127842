"""The command `ia3rt`: its subcommands, the demo, and how errors are told in one line.

It may import all of ia3rt. It starts what is in `serving` and `bench`; of those, only what a command needs is
imported, when it is called.
"""

"""The command `ia3rt`: its subcommands, the demo, and how errors are told in one line.

It may import everything below it, and starts what is in `serving` and `bench`. But for the options of `ia3rt bench`,
what a command needs is imported when it is called.
"""

"""What an adapter is: the sites where it acts, a mix of several, the bank of all that are resident, and its files.

Nothing here knows a model's modules or a forward. It imports nothing else of ia3rt: all rooms stand on this one.
"""

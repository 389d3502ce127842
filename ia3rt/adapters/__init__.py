"""What an adapter is: the sites where it acts, a mix of several, the bank of all that are resident, and its files.

Nothing here knows a forward, or how a vector is applied. It imports nothing else of ia3rt.
"""

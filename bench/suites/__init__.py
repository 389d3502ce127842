"""What is timed: a file a suite, each of which yields cases. One registry."""

"""What is compared: a file a contender. One registry."""

"""Where a forward's time and memory go above the base model's: counted, timed, and computed from shapes."""

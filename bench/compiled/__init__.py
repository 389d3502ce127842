"""What the kernels become for GPUs that need not be there: registers, spills, instructions; `python -m` prints them."""

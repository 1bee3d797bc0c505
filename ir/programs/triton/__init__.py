"""Programs for GPUs in Triton: compiled when they are first called, by the process that runs them."""

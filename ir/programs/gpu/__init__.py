"""Programs for NVIDIA GPUs, in TileLang. Only the compiler's process imports these modules."""

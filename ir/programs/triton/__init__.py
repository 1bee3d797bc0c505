"""Programs for GPUs in Triton: compiled when they are first called, by the process that runs them.

They are the path of training and inference on a GPU where no kernel was built, an independent check of the TileLang
programs, and the only ones that serve float32. ``hsa_compile.triton_kernels`` launches them on torch tensors;
``schedules/triton.py`` picks their tiles. Importing a module of this package imports Triton.

Conventions of all modules: sizes that shape a kernel are compile-time constants, ``B``, ``L`` and ``C`` are not;
``X_P`` is X rounded up to a power of two, for Triton's ranges have no other lengths; offsets are int64 as soon as they
depend on a token or a chunk.
"""

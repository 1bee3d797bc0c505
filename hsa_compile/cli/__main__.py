"""``python -m hsa_compile.cli``, for launchers such as torchrun."""

from hsa_compile.cli import app

app()

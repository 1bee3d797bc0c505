"""Measurements of operators (``kernels``) and whole models (``models``), in the one committed format (``record``)."""

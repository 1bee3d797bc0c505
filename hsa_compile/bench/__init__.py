"""Measurements of operators (``kernels``) and bundles (``e2e``), in the one committed format (``record``)."""

"""hsa-compile: train, compile and deploy language models with hierarchical sparse attention.

The pipeline, a package a step: ``model`` (PyTorch) → ``ir`` (operators and tile programs) → ``schedules`` (lowering
for a target) → ``export`` (ONNX, ONNX Runtime); this package drives it. Importing it loads none of them.
"""

__version__ = "0.1.0"

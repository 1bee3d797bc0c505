"""The model and its training, in eager PyTorch.

    config, layers, hsa, model    the architecture; ``state`` and ``cache`` are what it carries between steps
    data, train, evaluate         learning, and what was learnt
    generate, checkpoint          text, and files
    tokenizer                     bytes as tokens; needs no PyTorch

Import from these modules; this one loads nothing, so that running a bundle needs no PyTorch.
"""

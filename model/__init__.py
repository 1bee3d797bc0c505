"""The model and its training, in eager PyTorch.

    config, layers, encoder, hsa, model   the architecture; ``state`` and ``cache`` are what it carries between steps
    rows, packed                          rows of a batch that are not alike, and several documents in one
    baselines, landmark, mamba            what it is compared with; ``variants`` lists the rows of a comparison
    data, train, evaluate                 learning, and what was learnt
    prefill, generate, checkpoint         prompts, text, and files
    tokenizer                             bytes as tokens; needs no PyTorch

Import from these modules; this one loads nothing, so that running a bundle needs no PyTorch.
"""

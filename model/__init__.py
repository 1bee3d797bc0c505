"""The model and its training, in eager PyTorch.

    config, layers, hsa, model    the architecture; ``state`` and ``cache`` are what it carries between steps
    recipe, train, optimizer      learning: what is to be done, and the loop that does it
    data, shards, stream          texts, tokens, and the batches drawn from them
    resume, parallel, metrics     states to go on from, several processes, what is measured
    evaluate                      what was learnt
    generate, checkpoint          text, and files
    tokenizer                     bytes as tokens; needs no PyTorch

Import from these modules; this one loads nothing, so that running a bundle needs no PyTorch.
"""

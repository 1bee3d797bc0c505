"""The model and its training, in eager PyTorch.

    config, layers, encoder, hsa, model   the architecture; ``state`` and ``cache`` are what it carries between steps
    rows, packed                          rows of a batch that are not alike, and several documents in one
    host, flash, graph                    memory off the GPU, windows by FlashAttention, decoding from CUDA graphs
    baselines, landmark, mamba            what it is compared with; ``variants`` makes the rows of a comparison
    recipe, train, optimizer              learning: what is to be done, and the loop that does it
    data, shards, stream                  texts, tokens, and the batches drawn from them
    tasks                                 questions about facts hidden in texts, for training and evaluation
    resume, parallel, metrics             states to go on from, several processes, what is measured
    evaluate, diagnose                    held-out loss, and how well it selects
    prefill, generate, checkpoint         prompts, text, and files
    tokenizer                             bytes and other tokens; needs no PyTorch
    huggingface                           all of it behind the interface of Hugging Face transformers

Import from these modules; this one loads nothing, so that running a bundle needs no PyTorch.
"""

"""Questions about facts that are hidden in long texts, for training and for evaluation.

    problem     what a question is, and the register of all tasks
    pairs       ``{k:731}``: the shortest key and value there can be, for models of minutes
    ruler       RULER-style: needles (S-N, MK, MQ, MV), chains (VT), frequent words (CWE, FWE)
    babi        BABILong-style: qa1 to qa5, by a small world that is simulated
    haystack    the texts that facts are hidden in, a part at a time in memory
    weave       training samples: facts, questions and answers woven into text

Everything is drawn from a ``random.Random``: the same seed gives the same questions on every machine.
"""

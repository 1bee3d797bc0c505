"""How a model does on texts far longer than those it was trained on: the suite ``length``.

plan        what to ask, at which lengths
samples     the questions, each a function of seed, task, length and number
reading     contexts, by the short prefill where there is one
answers     what a model answers, greedily and teacher-forced
margins     how far right chunks score above others while answers are fed; ``margin_report`` shows it
run         contexts read whole, or one haystack that facts are written over; perplexity; cost
journal     one line a sample: results, and where a run goes on
report      accuracies with intervals, table, heat map and curves
harness     the same models behind lm-evaluation-harness
"""

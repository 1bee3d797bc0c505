"""A bundle behind HTTP: completions as OpenAI's clients ask for them, many texts decoded at once.

    api         what is asked and answered, checked
    app         routes, limits, errors, streaming
    scheduler   the one thread that runs the model: admits prompts, reads them in turns, decodes all rows together
    engine      rows of a session: what the scheduler needs of a model
    stops       text cut before its stop strings
    metrics     what Prometheus collects
    server      all of it on a port

Needs the extra ``serve``.
"""

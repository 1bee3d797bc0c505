"""Programs for CPUs, a module for each pass of each operator; every ``program(problem, tile)`` returns a ``Program``."""

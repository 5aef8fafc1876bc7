"""A run of `python -m perce.train`: the Trainer in a directory, and what is said of it.

run           prepares, checks, trains, finishes        summary       lines, tables and pages of a run
directory     claimed by one process, and resumed       diagnosis     notes where a number is off
interruption  Ctrl-C and signals end a run in order     card          README.md of the model
fits          whether the largest batch fits
"""

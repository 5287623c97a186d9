"""Mistakes that only a Trainer shows: its callbacks, its optimizers, its processes.

One file for each subject; ``all_rules.py`` lists all rules.
"""

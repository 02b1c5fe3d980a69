"""Whole tasks on a converted encoder, each a command: `python -m bertfast.recipes.NAME`."""

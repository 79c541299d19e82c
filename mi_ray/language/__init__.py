"""Prompts changed in one thing: the hard negatives of a prompt.

This room knows text alone; it must not know models or scores.
"""

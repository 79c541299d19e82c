"""Guidance methods: they change the sampling steps of a model that stays as it is, to follow the prompt better.

This room must not know scores, files or Ray.
"""

"""Changes of prompts: hard negatives, which differ from a prompt in one thing, and new prompts from templates.

This room knows only text. It must not know models or scores.
"""

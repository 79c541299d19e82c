"""The work of one actor on its prompts or pairs, on one device: sample, score, prune, decode.

This room must not know the project's file formats, other actors or Ray.
"""

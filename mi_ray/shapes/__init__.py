"""The embedded world: scenes, the grammar of their prompts, an exact oracle, and a small model trained on them.

This room must not know runs, scores or Ray.
"""

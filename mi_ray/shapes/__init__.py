"""The embedded world: scenes, their grammar, the exact oracle, and the model trained on them.

This room must not know runs, scores or Ray.
"""

"""What one actor does with its prompts or pairs, on one device: sample, score, prune, decode.

This room must not know files of ours, other actors or Ray.
"""

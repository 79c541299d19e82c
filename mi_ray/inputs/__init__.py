"""What users bring: prompt files, image-caption pairs, images, their plan into shards, and more prompts made of theirs.

This room reads and checks; of a model it knows the folder alone, and it must not know scores or Ray.
"""

"""What users bring: prompt files, image-caption pairs, images, and their plan into shards.

This room reads and checks; it must not know models, scores or Ray.
"""

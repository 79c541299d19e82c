"""Metrics: one file a metric, images and prompts in, named columns out.

This room must not know how an image was made, nor Ray.
"""

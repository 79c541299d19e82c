"""Metrics: one file per metric. A metric takes images and prompts and returns named columns.

This room must not know how an image was made. It must not know Ray.
"""

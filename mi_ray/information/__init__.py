"""Estimators of the mutual information between prompt and image. Input: tensors. Output: nats.

This room must not know models, prompt texts, files or Ray.
"""

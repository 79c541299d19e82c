"""Estimators of the information between prompt and image: tensors in, nats out.

This room must not know models, prompts as text, files or Ray.
"""

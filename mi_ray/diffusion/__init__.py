"""Models and sampling: model folders and families, denoisers, noise schedules, solvers, kernels, adapters.

This room must not know Ray, the configuration, the project's file formats, or what a score is.
"""

"""Models and sampling: folders, denoisers, noise schedules, solvers, kernels, adapters.

This room must not know Ray, configuration, files of ours, or what a score is.
"""

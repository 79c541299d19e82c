"""The work that Ray schedules: actor pools, trial runs, the stages of a job and their order.

This room must not hold a formula: the computations of an actor are in scoring/ and training/.
"""

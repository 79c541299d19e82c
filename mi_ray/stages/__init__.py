"""What Ray schedules: actor pools, trials, the stages of a job and their order.

This room must not hold a formula: what an actor computes lies in scoring/ and training/.
"""

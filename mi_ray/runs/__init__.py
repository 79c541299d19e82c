"""The run folder: its layout, exactly-once commits, the lease, and the status and cost of the run.

This room must not know how a stage computes its rows. It must not know Ray.
"""

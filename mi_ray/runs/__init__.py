"""What a run folder promises: its layout, exactly-once commits, the lease, its status and its cost.

This room must not know how a stage computes its rows, nor Ray.
"""

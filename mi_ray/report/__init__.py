"""Pages, tables and figures made of what a run has stored.

This room reads run folders; it must not know models or Ray.
"""

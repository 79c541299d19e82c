"""What learns: which candidates are kept, what a batch holds, the losses, the loop.

Ray Train is imported in loop.py and pretrain.py alone; the other files must not know it.
"""

"""The users' inputs: prompt files, image-caption pairs, images, the plan of their shards, and making new prompts.

This room reads and checks inputs. It knows only the folder of a model. It must not know scores or Ray.
"""

"""The embedded world: a pool, three tasks, a CLIP and a Stable Diffusion, small enough for two cores.

All of it is made by this package alone.
"""

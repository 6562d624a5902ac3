"""What connects the package with LAVIS and other programs: activation, compatibility, and most of the commands.

This file imports nothing, because it runs inside ``import torch``.
"""

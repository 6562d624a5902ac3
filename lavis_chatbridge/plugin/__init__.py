"""How the package enters LAVIS: door, compatibility, registration, ``lavis.train`` and ``lavis.evaluate``.

This file imports nothing, because it runs inside ``import torch``.
"""

"""How the package enters LAVIS: the door, LAVIS on today's libraries, registration, ``lavis.train``, ``lavis.evaluate``.

This file imports nothing, because it runs inside ``import torch``.
"""

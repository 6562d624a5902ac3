"""Annotators: plug-ins that put a frame or a sound into words. `base` holds their protocol, `registry` their names."""

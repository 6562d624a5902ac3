"""Data sets: readers of annotation files, LAVIS builders, mixtures, shards, and stored features; no model is known."""

"""Data sets: readers of annotation files, LAVIS builders, mixtures, shards and cached features. Knows no model."""

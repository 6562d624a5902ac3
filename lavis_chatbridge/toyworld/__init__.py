"""The embedded world: a small closed world with exact truth, so that scores of a tiny model mean something."""

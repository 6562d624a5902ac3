"""The embedded world: a small closed world with exact ground truth, which makes scores of a tiny model meaningful."""

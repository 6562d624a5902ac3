"""The embedded world: a small synthetic world with exact ground truth; even a tiny model gets meaningful scores."""

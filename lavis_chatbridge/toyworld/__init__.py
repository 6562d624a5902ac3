"""The embedded world: small synthetic media with exact ground truth, on which a tiny model gets meaningful scores."""

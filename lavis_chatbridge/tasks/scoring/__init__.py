"""Scores of predictions, each by the official implementation; nothing here knows a model or a data set."""

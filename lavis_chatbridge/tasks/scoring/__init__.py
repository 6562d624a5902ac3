"""Scores of predictions against references, answers, options and facts."""

"""LAVIS tasks: alignment, instruction tuning, captions and answers, multiple choice; and their scores.

``plugin/autoload.py`` imports the modules; settings and scores can be used without LAVIS.
"""

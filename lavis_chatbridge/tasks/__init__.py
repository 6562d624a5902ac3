"""LAVIS tasks: alignment, instruction tuning, captions and answers, multiple choice; and their scores.

``plugin/register.py`` names the modules that hold them: settings and scores are read without LAVIS.
"""

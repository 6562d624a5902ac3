"""Conversations as pieces, instruction templates, and the options of multiple choice: the parts of prompts."""

"""Making chat data: annotate media -> ask a language model -> check what it wrote -> build MULTIS.

Each stage reads and writes JSON lines, may be killed at any moment, and goes on where it stopped. Nothing here knows of
training. The paper's pipeline: arXiv 2305.16103, section 4.2.
"""

"""Makes chat data: annotate media -> query a language model -> check its answers -> build MULTIS.

Each stage reads and writes JSON lines, and a killed stage resumes when it is run again. Nothing here imports training.
The paper's pipeline: arXiv 2305.16103, section 4.2.
"""

"""What the fuzzing test and ``benchmarks/fuzz.py`` share: hostile inputs by seed, and where each of them is fed.

An input is bytes. The inputs of a target are made from a random generator, its special cases have names; the same
target, seed and number give the same bytes.
"""

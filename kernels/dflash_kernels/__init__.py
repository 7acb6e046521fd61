"""Triton kernels of the places where the time goes, one file an op.

Each op has a torch twin in `dflash_train`, which is its definition; this package knows torch and
triton only. Importing it compiles nothing: a kernel is compiled by its first launch.
"""

"""Main memory that is freed stays with the process: what the kernel gives anew, it clears first.

A step of training on a CPU frees all its activations and gradients, and the next one asks for as
much again. By default glibc returns large blocks to the kernel, page by page, thousands a step.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, as malloc.h numbers them."""
MOST = 2**31 - 1
LARGEST_BLOCK = 2**25
"""Bytes; glibc takes no more for the second of the parameters."""


def keep_freed() -> None:
    """Have the C library keep what is freed, for good; where it is not glibc, nothing happens."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(MMAP_THRESHOLD, LARGEST_BLOCK)
        mallopt(TRIM_THRESHOLD, MOST)

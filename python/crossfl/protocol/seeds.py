"""Seeds of the parts of a federation, all from its one seed."""

import hashlib


def derive_seed(seed: int, *names: str) -> int:
    """A seed for a named part of the federation, of 31 bits as a CWL `int` holds them."""
    words = "/".join((str(seed), *names))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big") >> 1

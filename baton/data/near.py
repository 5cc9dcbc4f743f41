"""Near duplicates: texts whose sets of three words in a row are alike, found by MinHash (Broder, 1997).

The signature of a text holds for each of 128 hash functions the least hash of its 3-grams. Two texts have an equal entry with
the probability of their Jaccard similarity, so the share of equal entries estimates it. Locality-sensitive hashing (Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) finds the few texts that are worth comparing.
"""

import numpy as np
import xxhash

from baton.errors import InputError

FUNCTIONS = 128
WORDS = 3


class NearDuplicates:
    """The records seen so far that no earlier one was like. Holds a few thousand bytes for each of them."""

    def __init__(self, threshold: float):
        """Raises InputError where the package datasketch is missing."""
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise InputError("--dedup near needs the package datasketch: run bash scripts/setup_envs.sh") from None
        self.threshold = threshold
        self.empty = MinHash(num_perm=FUNCTIONS, seed=1, hashfunc=xxhash.xxh32_intdigest)
        self.index = MinHashLSH(threshold=threshold, num_perm=FUNCTIONS)
        self.signatures: list[np.ndarray] = []

    def is_new(self, *texts: str, label: object = None) -> bool:
        """Whether no record before, of such texts in this order and this label, is like this one; if so, it is remembered.

        The same words as the chosen or the rejected response, or as a good or a bad one, are different.
        """
        signature = self.empty.copy()
        signature.update_batch([f"{label} {n} ".encode() + gram for n, text in enumerate(texts) for gram in grams(text)])
        values = signature.hashvalues.astype(np.uint32)
        for candidate in self.index.query(signature):
            if np.mean(self.signatures[candidate] == values) >= self.threshold:
                return False
        self.index.insert(len(self.signatures), signature)
        self.signatures.append(values)
        return True


def grams(text: str) -> list[bytes]:
    """The different 3-grams of a text's words, lower case; a text of fewer words is one gram."""
    words = text.lower().split()
    return sorted({" ".join(words[i : i + WORDS]).encode() for i in range(max(1, len(words) - WORDS + 1))})

"""A retrieval probe: does the model use a key–value pair far back in its context? Perplexity hardly notices.

A trial splices `key value` into a filler, a passage of a document, at a random depth, and ends with `key` again; what follows
is scored: NLL of the value's tokens. Its control has another key in front of the same value, so the value's tokens are in
both contexts and only their being bound to the key differs. Recall is control less trial, in nats per token of the
value: 0 for a model that cannot look back that far, whatever its size, and with teacher forcing it needs no generation.
Key, other key and value are spans from other documents than the filler; no token is used that the corpus lacks.
"""

from dataclasses import dataclass

import numpy as np

from data.shards import Split

KEY, VALUE = 16, 16  # tokens of a key and of a value


@dataclass
class Trial:
    """One trial, the same key, value, relative depth and passage's end for every length. Token arrays, int64."""

    key: np.ndarray  # (KEY,)
    other: np.ndarray  # (KEY,)
    value: np.ndarray  # (VALUE,)
    filler: np.ndarray  # as long as the longest length needs
    depth: float  # of the pair, 0 the beginning of the context, 1 just before the question

    def tokens(self, length: int, with_key: bool) -> np.ndarray:
        """The (length + 1,) tokens, `length` inputs and the last target; the value ends them."""
        filler = self.filler[len(self.filler) - filler_tokens(length) :]
        at = round(self.depth * len(filler))
        return np.concatenate(
            [filler[:at], self.key if with_key else self.other, self.value, filler[at:], self.key, self.value]
        )


def filler_tokens(length: int) -> int:
    """Tokens of filler at a length; none are left, or fewer, where it has no room for a pair and its question."""
    return length + 1 - 2 * (KEY + VALUE)


def make_trials(split: Split, documents: np.ndarray, longest: int, count: int, seed: int) -> list[Trial]:
    """`count` trials drawn from documents (n, 2), start and size. ValueError where they are too few or too short."""
    need = filler_tokens(longest)
    fillers, spans = (np.flatnonzero(documents[:, 1] >= n) for n in (need, max(KEY, VALUE)))
    if not len(fillers) or len(spans) < 2:
        raise ValueError(f"the probe at length {longest} needs a document of {need:,} tokens, and another for its keys")
    generator, trials = np.random.default_rng(seed), []

    def passage(choices, size):
        start, total = documents[generator.choice(choices)]
        at = int(start + generator.integers(total - size + 1))
        return split.read(at, at + size)

    for _ in range(count):
        home = generator.choice(fillers)
        filler = passage([home], need)
        key, other, value = (passage(spans[spans != home], n) for n in (KEY, KEY, VALUE))
        trials.append(Trial(key, other, value, filler, generator.random()))
    return trials

"""A retrieval probe: does the model use a key–value pair far back in its context? Perplexity hardly notices.

A trial splices `key value` into a filler, a passage of a document, at a random depth, and ends with `key` again. What
follows is scored: the NLL of the value's tokens. Its control has another key in front of the same value. So both
contexts hold the value's tokens, and only the key that they follow differs. Recall is the NLL of the control less that
of the trial, in nats per token of the value. It is 0 for a model that cannot look back that far, whatever its size.
Teacher forcing is enough: no text is generated. Key, other key and value are spans from other documents than the
filler, so that the corpus has every token.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data.shards import Data, Split
from nanope.evaluation.models import Model, Variant
from nanope.evaluation.options import Options
from nanope.evaluation.parts import Parts
from nanope.evaluation.protocols import spans_of
from nanope.evaluation.scoring import Compute, score_tokens, sum_over_ranks
from nanope.evaluation.statistics import document_interval

KEY, VALUE = 16, 16  # tokens of a key and of a value
MULTIPLES = (1, 2, 4, 8)  # of the training length, at which it is asked
FIGURES = ("recall", "interval", "with_key", "without_key", "accuracy", "trials")
DEPTHS = 5  # bins of depth, of equal width


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


def evaluate_probe(
    variant: Variant, data: Data, block_size: int, options: Options, compute: Compute, parts: Parts
) -> list[dict]:
    """A row for each multiple of the training length, of options.probe trials: see measure_recall. Null figures and a
    reason where the model, or the data, cannot do the length."""
    reasons = variant.reach([n * block_size for n in MULTIPLES])
    for length, reason in reasons.items():
        if reason is None and filler_tokens(length) < 1:
            reasons[length] = f"two times {KEY} + {VALUE} tokens do not fit into a length of {length}"
    tokens, _, documents = spans_of(data, options.split, False, 0)
    # The trials are those of the longest length that has documents, the same for all lengths, and for all models,
    # whatever length they reach
    for length in sorted((n for n in reasons if filler_tokens(n) > 0), reverse=True):
        try:
            trials = make_trials(tokens, documents, length, options.probe, options.seed)
            break
        except ValueError as error:
            reasons[length] = reasons[length] or str(error)
    rows = []
    for length, reason in reasons.items():
        row = {"length": length, **variant.label}
        if reason:
            rows.append(row | dict.fromkeys(FIGURES) | {"reason": reason})
            continue
        key = row | {"probe": options.probe, "split": options.split, "longest": len(trials[0].filler)}
        key["seed"] = options.seed
        found = parts.get(key)
        if found is None:
            found = parts.keep(key, measure_recall(variant.model, trials, length, options, compute))
        rows.append(row | found)
    return rows


def measure_recall(model: Model, trials: list[Trial], length: int, options: Options, compute: Compute) -> dict:
    """The figures of one length: recall in nats per token with its 95 % t interval over trials, the value's
    NLL with and without its key in context, the share of its tokens that were the likeliest, and the number of
    trials. `by_depth`: the same of the trials of each fifth of the depths, see figures_by_depth."""
    size, ranks = max(1, compute.batch_tokens // length), compute.ranks
    nll, hits = np.zeros((2, len(trials))), np.zeros((2, len(trials)))  # of trials, of controls: means over the value
    jobs = [(control, i) for control in (0, 1) for i in range(0, len(trials), size)]
    for number, (control, i) in enumerate(tqdm(jobs, desc=f"probe {length}", unit="batch", disable=compute.silent)):
        if number % ranks.world == ranks.rank:
            batch = np.stack([trial.tokens(length, not control) for trial in trials[i : i + size]])
            found = score_tokens(model, batch, np.full(len(batch), VALUE), compute.dtype)
            nll[control, i : i + size], hits[control, i : i + size] = (f.reshape(-1, VALUE).mean(1) for f in found)
    nll, hits = sum_over_ranks(np.stack((nll, hits)), model, ranks)
    recall = nll[1] - nll[0]
    return {
        "recall": float(recall.mean()),
        "interval": document_interval(recall, np.ones(len(trials))),
        "with_key": float(nll[0].mean()),
        "without_key": float(nll[1].mean()),
        "accuracy": float(hits[0].mean()),
        "trials": len(trials),
        "key_tokens": KEY,
        "value_tokens": VALUE,
        "by_depth": figures_by_depth(nll, np.array([trial.depth for trial in trials])),
    }


def figures_by_depth(nll: np.ndarray, depth: np.ndarray) -> list[dict]:
    """Of DEPTHS bins of depth, from `low` to `high`: recall with its interval over the bin's trials, NLL with and
    without the key, perplexity with it, and the number of trials; null figures where it is 0. nll (2, n): of trials and
    of controls, depth (n,) in [0, 1)."""
    found = []
    for i in range(DEPTHS):
        row = {"low": i / DEPTHS, "high": (i + 1) / DEPTHS}
        with_key, without = nll[:, np.floor(depth * DEPTHS) == i]
        row |= dict.fromkeys(("recall", "interval", "with_key", "without_key", "perplexity"))
        row["trials"] = len(with_key)
        if len(with_key):
            row |= {"recall": float((without - with_key).mean()), "with_key": float(with_key.mean())}
            row |= {"interval": document_interval(without - with_key, np.ones(len(with_key)))}
            row |= {"without_key": float(without.mean()), "perplexity": float(np.exp(with_key.mean()))}
        found.append(row)
    return found

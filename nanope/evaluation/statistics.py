"""How sure a figure is: intervals over documents, and paired comparisons of runs over seeds and documents."""

import math

import numpy as np
import scipy  # whose parts load where they are used: scipy.stats takes a second

# Of one row of results, in the order of a report
FIGURES = (
    "nats_per_token",
    "perplexity",
    "bits_per_byte",
    "accuracy",
    "tokens",
    "documents",
    "interval",
    "perplexity_interval",
    "per_document",
)
BINS_PER_DOUBLING = 4  # of a per-position curve
LEAST_P = 1e-100  # p-values end here
FEW = 10  # documents, below which an interval is a rough guide at best: a report says so
METHOD = "95 % t interval of the linearised ratio over documents, nats per token"


def few_documents(n: int) -> str:
    """What a reader of an interval over n documents must know, where n < FEW."""
    return f"Intervals over {n} documents are a rough guide: with fewer than {FEW} a single odd one decides."


def document_interval(sums: np.ndarray, counts: np.ndarray) -> list[float] | None:
    """95 % interval of Σ sums / Σ counts over documents, (n,) each; None for a single document.

    The ratio r is linearised (Cochran, "Sampling Techniques", section 6.4): it varies as the mean of
    dᵢ = (sᵢ - r nᵢ) / mean(n) does, and Student's t with n - 1 degrees of freedom gives its reach.

    Simulated in tests/nanope/evaluation/test_statistics.py, with a standard deviation of 0.2 nats between documents:
    for 2, 3 and 13 documents it covers the truth in 0.95, 0.94 and 0.94 of cases where lengths are log-normal with
    σ = 0.5; a percentile bootstrap in 0.49, 0.76 and 0.89. With σ = 1, where a few documents have most of the text, it
    covers 0.91, 0.87 and 0.88.
    """
    n = len(sums)
    if n < 2:
        return None
    ratio = sums.sum() / counts.sum()
    deviations = (sums - ratio * counts) / counts.mean()
    reach = scipy.special.stdtrit(n - 1, 0.975) * math.sqrt((deviations**2).sum() / (n - 1) / n)
    return [float(ratio - reach), float(ratio + reach)]


def row_figures(nll: np.ndarray, hits: np.ndarray, n_bytes: np.ndarray, document: np.ndarray) -> dict:
    """Figures of one row from its scored tokens.

    nll in nats, hits (the likeliest token was right), n_bytes of text, document indices: (n,) each. Means are over
    tokens. Bits per byte divide by the bytes of the text. An end-of-text token counts 0 bytes.
    """
    mean = nll.sum() / len(nll)
    present = np.flatnonzero(np.bincount(document))
    sums, counts, size = (np.bincount(document, of)[present] for of in (nll, None, n_bytes))
    interval = document_interval(sums, counts)
    return {
        "nats_per_token": float(mean),
        "perplexity": float(np.exp(mean)),
        "bits_per_byte": float(nll.sum() / math.log(2) / n_bytes.sum()),
        "accuracy": float(hits.mean()),
        "tokens": len(nll),
        "documents": len(sums),
        "interval": interval,
        "perplexity_interval": interval and np.exp(interval).tolist(),
        "per_document": {
            "document": present.tolist(),
            "nll": sums.tolist(),
            "tokens": counts.tolist(),
            "bytes": size.astype(int).tolist(),
        },
    }


def exact_matches(row: dict) -> np.ndarray:
    """Of a row of a task: 1 for each example whose answer was right at every place, else 0: (examples,)."""
    each = row["per_example"]
    return (np.array(each["right"]) == np.array(each["answers"])).astype(float)


def growing_edges(longest: int) -> np.ndarray:
    """Where bins of 1 … longest begin whose width grows, BINS_PER_DOUBLING a doubling, and longest + 1: int64."""
    edges = np.unique(np.round(2 ** np.arange(0, math.log2(longest + 1), 1 / BINS_PER_DOUBLING)).astype(int))
    edges = np.append(edges[edges <= longest], longest + 1)
    if len(edges) > 2 and (edges[-1] - edges[-2]) < (edges[-2] - edges[-3]) / 2:  # a last bin too thin to be read
        edges = np.delete(edges, -2)
    return edges


def position_curve(nll: np.ndarray, document: np.ndarray, length: int) -> dict:
    """NLL by position, in bins whose width grows with the position: nll (windows·length,) in nats, document the same
    shape.

    Lists, one entry a bin: first and last, the tokens of context that its targets have (1 … length); nats, the mean
    over tokens; low and high, its 95 % interval over documents (null for a single one); tokens.
    """
    edges = growing_edges(length)
    nll, document = nll.reshape(-1, length), document.reshape(-1, length)
    curve = {"first": edges[:-1].tolist(), "last": (edges[1:] - 1).tolist()}
    curve |= {"nats": [], "low": [], "high": [], "tokens": []}
    for first, end in zip(edges[:-1] - 1, edges[1:] - 1):
        of = document[:, first:end].ravel()
        counts = np.bincount(of)
        sums, counts = np.bincount(of, nll[:, first:end].ravel())[counts > 0], counts[counts > 0]
        low, high = document_interval(sums, counts) or (None, None)
        curve["nats"].append(float(sums.sum() / counts.sum()))
        curve["low"].append(low)
        curve["high"].append(high)
        curve["tokens"].append(int(counts.sum()))
    return curve


def paired_difference(a: np.ndarray, b: np.ndarray, tokens: np.ndarray, paired: bool) -> dict:
    """Mean of b less a in nats per token, with 95 % interval and two-sided p-value, from two levels: seeds, then
    documents.

    a (seeds of A, n), b (seeds of B, n): NLL sums of each document, the same documents and tokens (n,) for all.
    `paired`: seed i of A belongs to seed i of B. `levels` of the result says which levels are in: one seed in an arm
    tells nothing of the variance between seeds, and one document nothing of that between documents.

    Each level has a standard error: that of the seeds' differences (two of them where seeds are not paired), and that
    of the linearised ratio of sums over documents, of the seeds' mean. The interval reaches √Σ(tᵢ·sᵢ)², where tᵢ is
    Student's quantile for the degrees of freedom of its own level (Banerjee 1960, Sankhyā 22, p. 357). It is never
    narrower than that of one level alone, so three seeds count as three. p is the level at which it would end at 0.

    Simulated without a true difference for 2, 3 and 5 seeds and 4 to 40 documents (five cases are in
    tests/nanope/evaluation/test_statistics.py): it covers 0 in 0.94 to 0.99 of cases. The sum of the variances with
    Satterthwaite's degrees of freedom, which was here until 2026-11-30, does so in 0.88 (2 seeds) and 0.92 (3) in the
    worst case, and a percentile bootstrap in 0.76.
    """
    total, n = tokens.sum(), a.shape[1]
    means = [x.sum(1) / total for x in (a, b)]  # (seeds,) nats per token
    difference = means[1].mean() - means[0].mean()
    parts, levels = [], []  # (standard error, degrees of freedom)
    if min(len(a), len(b)) > 1:
        levels.append("seeds")
        each = [means[1] - means[0]] if paired else means
        parts += [(x.std(ddof=1) / math.sqrt(len(x)), len(x) - 1) for x in each]
    if n > 1:
        levels.append("documents")
        residual = b.mean(0) - a.mean(0) - difference * tokens
        parts.append((math.sqrt(n / (n - 1) * (residual**2).sum()) / total, n - 1))
    result = {
        "difference": float(difference),
        "interval": None,
        "p_value": None,
        "levels": levels,
        "seeds": [len(a), len(b)],
        "paired_seeds": paired,
        "documents": n,
    }
    if reach := reach_of(parts, 0.05):
        result["interval"] = [float(difference - reach), float(difference + reach)]
        result["p_value"] = p_value(difference, parts)
    return result


def reach_of(parts: list[tuple[float, int]], p: float) -> float:
    """Half the width of the interval at 1 - p that standard errors with their degrees of freedom make together."""
    return math.hypot(*(-scipy.special.stdtrit(freedom, p / 2) * error for error, freedom in parts))


def p_value(difference: float, parts: list[tuple[float, int]]) -> float:
    """The p at which the interval of a difference ends at 0, within LEAST_P … 1."""
    beyond = lambda log_p: reach_of(parts, math.exp(log_p)) - abs(difference)  # noqa: E731
    least = math.log(LEAST_P)
    if beyond(least) <= 0:
        return LEAST_P
    return math.exp(scipy.optimize.brentq(beyond, least, 0.0))


def difference_of_matches(a: list[dict], b: list[dict], paired: bool) -> dict:
    """paired_difference of exact matches, from rows of a task on the same n examples, one a seed; positive where b is
    better.

    Where all examples and seeds show the same difference, such as 1 of a scheme that is always right against one that
    never is, there is no variance to go by. The interval then reaches as far as Wilson's does for n of n, and there is
    no p-value.
    """
    each = [np.stack([exact_matches(row) for row in rows]) for rows in (a, b)]  # (seeds, n)
    n = each[0].shape[1]
    found = paired_difference(*each, np.ones(n), paired)
    if found["interval"] is None:
        z, middle = scipy.special.ndtri(0.975), found["difference"]
        reach = z**2 / (n + z**2)
        found["interval"] = [float(max(middle - reach, -1)), float(min(middle + reach, 1))]
    return found

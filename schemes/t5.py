"""Raffel et al. 1910.10683: r[bucket(m - n), h] on the score of query m and key n of head h, a table of trained biases.

With n buckets and e = n/2, buckets 0 … e-1 are the distances 0 … e-1. Of the others, bucket e + j starts at
e (longest/e)^(j/(n-e)), so they are as wide as their distance is large. The last one serves every distance beyond it.
"""

import functools

import torch
import torch.nn as nn

from schemes.base import Scheme

LIMIT = 2**20  # of the distances that a table of their buckets holds


@functools.cache
def first_distances(buckets: int, longest: int) -> list[int]:
    """The least distance of each bucket but bucket 0. In whole numbers, so that no rounding moves one: d belongs to
    bucket e + j or later where d^(n-e) e^j ≥ e^(n-e) longest^j."""
    exact = buckets // 2
    coarse, found = buckets - exact, list(range(1, exact + 1))
    for j in range(1, coarse):
        d = max(exact, round(exact * (longest / exact) ** (j / coarse)) - 1)  # within 1 of it
        while d**coarse * exact**j < exact**coarse * longest**j:
            d += 1
        found.append(d)
    return found


class T5(Scheme):
    """`t5`. Options:

    buckets: how many, half of them for one distance each. longest: the distance at which the log-spaced buckets would
    end. std: the table starts at N(0, std²); 1/√C where none is given, as in transformers' T5. share_layers: one table
    for all layers, as in T5; false gives each layer its own. T5 does not divide scores by √D; here they are, as in all
    schemes. KERPLE's code divides them too, and multiplies the table by √D: for 12 heads of 64 its bias starts at 1.7
    and a step moves it 8 times as far. The bias of t5x starts at 0.2 there, where 1/√C is 0.04.

    Parameters: table (buckets, H), N(0, std²). Not decayed: table.
    Beyond block_size: yes, all distances from the last bucket's on are one.
    Cache: none of its own.
    Cost: one look-up a pair and head; a bias, whose dense form on a CPU takes H·T² numbers, the same in each sequence.
    """

    undecayed = ("table",)

    def __init__(
        self,
        config,
        layer,
        *,
        buckets: int = 32,
        longest: int = 128,
        std: float | None = None,
        share_layers: bool = True,
    ):
        super().__init__(config, layer)
        if buckets < 2 or buckets % 2:
            raise ValueError(f"t5's buckets must be an even number of at least 2, not {buckets}")
        if not buckets // 2 < longest <= LIMIT:
            raise ValueError(
                f"t5's longest must exceed half of its {buckets} buckets and not {LIMIT}, which is not so for {longest}"
            )
        if std < 0:
            raise ValueError(f"t5's std must not be negative, but is {std}")
        self.std = std
        self.shared = ("table",) if share_layers else ()
        self.table = nn.Parameter(torch.empty(buckets, config.n_head))
        firsts = first_distances(buckets, longest)  # the last one is of bucket n-1
        bucket = torch.bucketize(torch.arange(firsts[-1] + 1), torch.tensor(firsts), right=True)
        self.register_buffer("bucket", bucket, persistent=False)

    @classmethod
    def complete_options(cls, options, config):
        return options | {"std": config.n_embd**-0.5} if options.get("std") is None else options

    def initial(self, name, shape, normal):
        return normal(self.std)

    def bias(self, x, q, k, ctx):
        by_distance = self.table.to(ctx.dtype)[self.bucket]  # (distances, H)
        last = by_distance.size(0) - 1
        return lambda batch, head, m, n: by_distance[(m - n).clamp(0, last), head]

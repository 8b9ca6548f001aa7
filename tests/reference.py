"""A second GPT-2 with every positional scheme, for the tests: slow, differentiable, written from the papers' formulas.

It shares nothing with model.py and schemes/ but the names of parameters and options. Every rotation is a dense (D, D)
matrix for each position, comrope's by torch.matrix_exp; the scores and the softmax are written out.
B batch, T positions, H heads, D head width, C = H·D. Everything has the dtype of the parameters: use float64.
"""

import dataclasses
import itertools
import math

import torch

J = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)  # one radian per unit, counterclockwise


def rotations(angles):
    """(..., n) angles → (..., 2n, 2n): block-diagonal rotations of neighbouring channels."""
    c, s = angles.cos(), angles.sin()
    blocks = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)  # (..., n, 2, 2)
    return block_diagonal(blocks)


def block_diagonal(blocks):
    """(..., n, b, b) → (..., nb, nb)."""
    n, b = blocks.size(-3), blocks.size(-1)
    full = blocks.new_zeros(*blocks.shape[:-3], n * b, n * b)
    for j in range(n):
        full[..., j * b : (j + 1) * b, j * b : (j + 1) * b] = blocks[..., j, :, :]
    return full


def rope_angles(T, D, base, fraction=1.0, start=0):
    """(T, D/2): m·base^(-2i/width) for the leading `fraction` of the channels, 0 for the rest."""
    width = round(D * fraction)
    angles = torch.zeros(T, D // 2, dtype=torch.float64)
    for m in range(T):
        for i in range(width // 2):
            angles[m, i] = (start + m) * base ** (-2 * i / width)
    return angles


def carope_phases(source, weight, bias, D, first=0):
    """(B, T, H, D/2): φ_i(m) = Σ_{t≤m} f(x_t)^(first+i), f = 1/(1 + softplus(x W + b)), added up one token at a time.

    No weight: W = 0.
    """
    weight = torch.zeros(bias.numel(), source.size(-1), dtype=source.dtype) if weight is None else weight
    z = source @ weight.T + (0 if bias is None else bias)  # (B, T, H)
    f = 1 / (torch.log(1 + torch.exp(z)) + 1)
    powers = torch.stack([f ** (first + i) for i in range(D // 2)], -1)  # (B, T, H, D/2)
    return torch.stack(list(itertools.accumulate(powers.unbind(1))), 1)


def comrope_rotations(P, theta, unit, T, start=0):
    """(T, H, D, D): exp((m/unit)·θ(P - Pᵀ)), one matrix exponential for each position."""
    A = P - P.transpose(-1, -2)
    A = A if theta is None else theta[..., None, None] * A
    return torch.stack([block_diagonal(torch.matrix_exp(A * (start + m) / unit)) for m in range(T)])


def alibi_slopes(H):
    """The function in the paper's repository (ofirpress/attention_with_linear_biases, get_slopes)."""

    def power_of_2(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(H).is_integer():
        return power_of_2(H)
    closest = 2 ** math.floor(math.log2(H))
    return power_of_2(closest) + alibi_slopes(2 * closest)[0::2][: H - closest]


def sinusoids(T, C, base, scale):
    """Vaswani 1706.03762, section 3.5."""
    table = torch.zeros(T, C, dtype=torch.float64)
    for m in range(T):
        for i in range(C // 2):
            table[m, 2 * i] = scale * math.sin(m / base ** (2 * i / C))
            table[m, 2 * i + 1] = scale * math.cos(m / base ** (2 * i / C))
    return table


def complex_linear(x, A, B):
    """ỹ = (A + iB) x̃ on neighbouring channels: x (..., C), A and B (n, C/2) → (..., 2n)."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) @ torch.complex(A, B).T).flatten(-2)


def grouped_linear(x, A, B):
    """Even channels by A, odd ones by B: x (..., C), A and B (n, C/2) → (..., 2n)."""
    y = x.new_zeros(*x.shape[:-1], 2 * A.size(0))
    y[..., 0::2], y[..., 1::2] = x[..., 0::2] @ A.T, x[..., 1::2] @ B.T
    return y


def layer_norm(x, p, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * p[name + ".weight"] + p.get(name + ".bias", 0)


def linear(x, p, name):
    return x @ p[name + ".weight"].T + p.get(name + ".bias", 0)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# ---- the schemes, by what they change: each function gets a Layer


@dataclasses.dataclass
class Layer:
    """One layer of attention, as a scheme's formula sees it."""

    x: torch.Tensor  # (B, T, C) the normed input
    q: torch.Tensor  # (B, T, H, D), k likewise: before positions in ROTATIONS, with them later
    k: torch.Tensor
    options: dict
    embedding: torch.Tensor  # (B, T, C) of the tokens
    config: object
    parameters: dict
    name: str  # transformer.h.0.attn

    def own(self, name):
        """A parameter of the scheme's: this layer's, or that of layer 0 which all share; None where there is none."""
        found = self.parameters.get(f"{self.name}.pos.{name}")
        return self.parameters.get(f"transformer.h.0.attn.pos.{name}") if found is None else found

    @property
    def sizes(self):
        """B, T, H, D."""
        return self.q.shape

    @property
    def distance(self):
        """(T, T): m - n of query m and key n."""
        T = self.q.size(1)
        return torch.arange(T).view(-1, 1) - torch.arange(T)


ROTATIONS, ENCODINGS, BIASES, SCORES, WEIGHTS = {}, {}, {}, {}, {}


def of(table, *schemes):
    """A decorator: the function is what these schemes do.

    ROTATIONS  (layer) → (B, T, H, D, D), or what broadcasts to it: a matrix for q and k
    ENCODINGS  (layer) → q, k (B, T, H, any width): for what is no such matrix
    BIASES     (layer) → (B, H, T, T), or what broadcasts to it: added after the division by √D
    SCORES     (layer) → (B, H, T, T), divided by √D already, instead of q kᵀ / √D
    WEIGHTS    (layer, scores (B, H, T, T), -inf where a key is hidden) → attention weights instead of the softmax
    """

    def enter(function):
        table.update(dict.fromkeys(schemes, function))
        return function

    return enter


@of(ROTATIONS, "rope", "crope")
def rope(layer):
    _, T, _, D = layer.sizes
    return rotations(rope_angles(T, D, layer.options["base"], layer.options["fraction"])).view(1, T, 1, D, D)


@of(ROTATIONS, "comrope")
def comrope(layer):
    T = layer.sizes[1]
    return comrope_rotations(layer.own("P"), layer.own("theta"), layer.options["unit"], T).unsqueeze(0)


@of(ROTATIONS, "carope")
def carope(layer):
    source = layer.x if layer.options["source"] == "hidden" else layer.embedding
    weight, bias = layer.own("c_pos.weight"), layer.own("c_pos.bias")
    return rotations(carope_phases(source, weight, bias, layer.sizes[3], layer.options["first_power"]))


@of(BIASES, "alibi")
def alibi(layer):
    slopes = torch.tensor(alibi_slopes(layer.sizes[2]), dtype=layer.x.dtype)
    return -slopes.view(-1, 1, 1) * layer.distance


def t5_bucket(distance, buckets, longest):
    """The bucket of a distance ≥ 0, one at a time."""
    exact = buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(longest / exact)
    return min(buckets - 1, exact + math.floor(share * (buckets - exact) + 1e-9))  # + of rounding


@of(BIASES, "t5")
def t5(layer):
    T, own = layer.sizes[1], layer.options
    rows = [[t5_bucket(max(m - n, 0), own["buckets"], own["longest"]) for n in range(T)] for m in range(T)]
    return layer.own("table")[torch.tensor(rows)].permute(2, 0, 1)


@of(BIASES, "kerple")
def kerple(layer):
    r1 = torch.log(1 + layer.own("r1").exp()).view(-1, 1, 1)
    r2 = layer.own("r2").view(-1, 1, 1)
    distance = layer.distance.abs().to(r1.dtype)
    if layer.options["kind"] == "power":
        return -r1 * distance ** (2 / (1 + torch.exp(-r2)))
    return -r1 * torch.log(1 + torch.log(1 + r2.exp()) * distance)


@of(BIASES, "fire")
def fire(layer):
    T = layer.sizes[1]
    c, L = layer.own("log_c").exp(), layer.own("log_L").exp()
    zero, rows = torch.zeros_like(c), []
    for m in range(T):
        span = torch.log(c * max(L, zero + m) + 1)
        y = torch.stack([torch.log(c * max(m - n, 0) + 1) / span for n in range(T)]).unsqueeze(-1)  # (T, 1)
        hidden = (y @ layer.own("hidden.weight").T + layer.own("hidden.bias")).clamp_min(0)
        rows.append(hidden @ layer.own("out.weight").T)  # (T, H)
    return torch.stack(rows).permute(2, 0, 1)


def between(steps):
    """Σ_{t=n+1..m} of steps (B, T, H), 0 where n ≥ m: (B, H, T, T)."""
    B, T, H = steps.shape
    sums = steps.new_zeros(B, H, T, T)
    for m in range(T):
        for n in range(m):
            sums[:, :, m, n] = steps[:, n + 1 : m + 1].sum(1)
    return sums


@of(BIASES, "fox")
def fox(layer):
    gate = 1 / (1 + torch.exp(-(layer.x @ layer.own("gate.weight").T + layer.own("gate.bias"))))
    return between(gate.log())


@of(BIASES, "cable")
def cable(layer):
    steps = (layer.x @ layer.own("distance.weight").T).clamp_min(0)
    weights = torch.log(1 + torch.exp(layer.x @ layer.own("slope.weight").T))  # (B, T, H)
    return -weights.transpose(1, 2).unsqueeze(-1) * between(steps)


# ---- the model


def attention(x, embedding, config, p, name):
    """x (B, T, C), the normed input, and the token embeddings (B, T, C) → (B, T, C)."""
    pos, options = config.pos, config.pos_options
    B, T, C = x.shape
    H, D = config.n_head, config.n_embd // config.n_head
    if pos == "crope" or options.get("qkv") == "grouped":
        halved = complex_linear if pos == "crope" else grouped_linear
        qkv = halved(x, p[name + ".c_attn.A"], p[name + ".c_attn.B"]) + p.get(name + ".c_attn.bias", 0)
    elif options.get("qkv") == "low-rank":
        few = x @ p[name + ".c_attn.down"].T
        qkv = few @ p[name + ".c_attn.up"].T + p.get(name + ".c_attn.bias", 0)
    else:
        qkv = linear(x, p, name + ".c_attn")
    q, k, v = (part.reshape(B, T, H, D) for part in qkv.split(C, -1))

    if config.qk_norm:
        q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    layer = Layer(x, q, k, options, embedding, config, p, name)
    if pos in ROTATIONS:
        R = ROTATIONS[pos](layer).expand(B, T, H, D, D)
        layer.q, layer.k = (torch.einsum("bthij,bthj->bthi", R, z) for z in (q, k))
    if pos in ENCODINGS:
        layer.q, layer.k = ENCODINGS[pos](layer)
    if config.logit_scale == "log":
        visible = torch.arange(1, T + 1).clamp_max(config.window or T)
        layer.q = layer.q * p[name + ".logit_scale"].view(H, 1) * visible.to(x.dtype).log().view(T, 1, 1)
    scores = SCORES[pos](layer) if pos in SCORES else torch.einsum("bmhd,bnhd->bhmn", layer.q, layer.k) / math.sqrt(D)
    if pos in BIASES:
        scores = scores + BIASES[pos](layer)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    if config.window:
        future = future | (layer.distance >= config.window)
    scores = scores.masked_fill(future, -math.inf)
    if pos in WEIGHTS:
        weights = WEIGHTS[pos](layer, scores)
    else:
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return linear(torch.einsum("bhmn,bnhd->bmhd", weights, v).reshape(B, T, C), p, name + ".c_proj")


def logits(config, p, idx):
    """config (options written out), parameters by name, idx (B, T) → logits (B, T, V)."""
    T, C = idx.size(1), config.n_embd
    embedding = x = p["transformer.wte.weight"][idx]
    if config.pos == "learned":
        x = x + p["transformer.wpe.weight"][:T]
    if config.pos == "sinusoidal":
        x = x + sinusoids(T, C, config.pos_options["base"], config.pos_options["scale"])
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        x = x + attention(layer_norm(x, p, block + ".ln_1"), embedding, config, p, block + ".attn")
        h = layer_norm(x, p, block + ".ln_2")
        x = x + linear(gelu(linear(h, p, block + ".mlp.c_fc")), p, block + ".mlp.c_proj")
    return layer_norm(x, p, "transformer.ln_f") @ p["transformer.wte.weight"].T


def cross_entropy(logits, targets):
    """Mean over the targets that are not -1."""
    keep = targets >= 0
    logp = logits - logits.logsumexp(-1, keepdim=True)
    return -logp[keep].gather(-1, targets[keep].unsqueeze(-1)).mean()

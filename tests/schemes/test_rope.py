"""rope: equal to GPT-NeoX of the transformers library, and its base that depends on the head width."""

import math

import pytest
import torch
from models import HEADS, LAYERS, VOCAB, WIDTH, D, close, config, randomise, tokens

from model import GPT


@pytest.mark.parametrize("width, base", [(16, 67.54), (32, 4562), (64, 2.081e7)])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_base_where_carope_stands_without_a_bias(width, base, fraction):
    """A number by the width that turns, so that θ_i = f^i with f = 1/(1 + ln 2), which is carope at W = 0."""
    options = {"base": "(1+ln2)^(D/2)", "fraction": fraction}
    model = GPT(config("rope", options, n_head=2, n_embd=round(2 * width / fraction)))
    assert model.config.pos_options["base"] == pytest.approx(base, rel=1e-3)
    theta = model.transformer.h[0].attn.pos.frequencies()[: width // 2]
    close(theta, (1 + math.log(2)) ** -torch.arange(width // 2, dtype=torch.float64))


@pytest.mark.slow  # transformers takes seconds to import
@pytest.mark.parametrize("fraction,bias", [(1.0, True), (0.5, True), (0.25, False)])
def test_rope_equals_transformers_gpt_neox(fraction, bias):
    """With sequential residuals and tied embeddings there, our neighbouring pairs permuted to NeoX's halves, and zero
    biases where ours has none."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, hidden_act="gelu_new", max_position_embeddings=64,
    )  # fmt: skip
    rotary = dict(rotary_pct=fraction, rotary_emb_base=10000)
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(**shape, **rotary, tie_word_embeddings=True, use_parallel_residual=False)
    ).eval()
    assert theirs.config.rope_parameters["partial_rotary_factor"] == fraction
    ours = GPT(config("rope", {"fraction": fraction}, bias=bias))
    randomise(ours)
    state, turning = ours.state_dict(), round(fraction * D)
    # Our channel at each of their places
    halves = [*range(0, turning, 2), *range(1, turning, 2), *range(turning, D)]

    def query_key_value(w):  # (3, H, D, …) → (H, 3, D, …)
        w = w.unflatten(0, (3, HEADS, D))
        return torch.cat((w[:2, :, halves], w[2:])).transpose(0, 1).flatten(0, 2)

    tied = ("embed_in.weight", "embed_out.weight", "lm_head.weight")
    new = {name: state["lm_head.weight"] for name in theirs.state_dict() if name.endswith(tied)}
    names = {
        "attention.query_key_value": "attn.c_attn",
        "attention.dense": "attn.c_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "mlp.dense_h_to_4h": "mlp.c_fc",
        "mlp.dense_4h_to_h": "mlp.c_proj",
    }
    pairs = {f"gpt_neox.layers.{i}.{a}": f"transformer.h.{i}.{b}" for i in range(LAYERS) for a, b in names.items()}
    for a, b in (pairs | {"gpt_neox.final_layer_norm": "transformer.ln_f"}).items():
        for part in ("weight", "bias"):
            value = state.get(f"{b}.{part}", torch.zeros_like(theirs.state_dict()[f"{a}.{part}"]))
            new[f"{a}.{part}"] = query_key_value(value) if b.endswith("c_attn") else value
    theirs.load_state_dict(new)  # strict: every name must match
    idx = tokens(64)
    ours, theirs = ours.double(), theirs.double()
    close(ours(idx)[0], theirs(idx).logits, atol=5e-6)  # their angles are float32 even in a float64 model

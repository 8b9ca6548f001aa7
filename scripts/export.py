"""Write a run as a model of the transformers library, with its tokenizer, for AutoModelForCausalLM.from_pretrained.

    python scripts/export.py runs/NAME --to hf --out exported/NAME

`learned` becomes GPT2LMHeadModel; `rope` and `crope` (its complex-linear weights written out as dense ones) become
GPTNeoXForCausalLM with a sequential residual. What is written is loaded again and its logits compared before the command ends.
Needs requirements-dev.txt. An exported model runs in lm-evaluation-harness: lm_eval --model hf --model_args pretrained=DIR --tasks …
"""

import argparse
import lzma
import sys
from pathlib import Path

import _root
import torch

from data.tokenizer import BYTE_CHARACTERS, VOCABULARY, load_tokenizer
from model import GPT
from nanope import checkpoint

REASONS = {
    "comrope": "GPT-NeoX has one set of frequencies for all heads and layers, and comrope trains them per head and layer",
    "carope": "no architecture of transformers has content-dependent frequencies",
    "alibi": "the ALiBi models of transformers (BLOOM, MPT) differ elsewhere: an additional LayerNorm, another GELU",
    "sinusoidal": "no causal GPT-2-style model of transformers adds sinusoids to the token embeddings",
    "none": "no GPT-2-style model of transformers is without positions",
}
TOLERANCE = 1e-4  # of logits


def as_gpt2(model: GPT, eot: int):
    """(config, state) of the GPT2LMHeadModel that computes the same as a `learned` model."""
    import transformers

    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, activation_function="gelu_new",
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, layer_norm_epsilon=1e-5, bos_token_id=eot, eos_token_id=eot,
    )  # fmt: skip
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D holds (in, out)
    state = {
        name: value.t().contiguous() if name.endswith(linear) else value for name, value in model.state_dict().items()
    }
    return transformers.GPT2LMHeadModel, config, state


def as_gpt_neox(model: GPT, eot: int):
    """(config, state) of the GPTNeoXForCausalLM that computes the same as a `rope` or `crope` model.

    GPT-NeoX holds q, k, v as (H, 3, D) and pairs the turning channels i and i + width/2, where here they are neighbours.
    """
    import transformers

    c, rope = model.config, model.to_rope()
    D, base = c.n_embd // c.n_head, c.pos_options["base"]
    width = round(c.pos_options["fraction"] * D)
    config = transformers.GPTNeoXConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, intermediate_size=4 * c.n_embd,
        hidden_act="gelu_new", attention_dropout=c.dropout, hidden_dropout=c.dropout, max_position_embeddings=c.block_size, layer_norm_eps=1e-5,
        bos_token_id=eot, eos_token_id=eot, tie_word_embeddings=True, use_parallel_residual=False, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": base, "partial_rotary_factor": width / D},
    )  # fmt: skip
    halves = [*range(0, width, 2), *range(1, width, 2), *range(width, D)]

    def qkv(value):  # (3C, …) as (3, H, D) → (H, 3, D), q and k with their channels in halves
        q, k, v = value.unflatten(0, (3, c.n_head, D)).unbind(0)
        return torch.stack((q[:, halves], k[:, halves], v), 1).flatten(0, 2)

    names = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_attn": "attention.query_key_value", "attn.c_proj": "attention.dense", "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}  # fmt: skip
    ours, state = rope.state_dict(), {}
    wte = ours["transformer.wte.weight"]
    state |= {"gpt_neox.embed_in.weight": wte, "lm_head.weight": wte}
    for i in range(c.n_layer):
        for name, theirs in names.items():
            for kind in ("weight", "bias"):
                value = ours.get(f"transformer.h.{i}.{name}.{kind}")
                if value is not None:
                    state[f"gpt_neox.layers.{i}.{theirs}.{kind}"] = qkv(value) if name == "attn.c_attn" else value
    state |= {
        f"gpt_neox.final_layer_norm.{kind}": ours[f"transformer.ln_f.{kind}"]
        for kind in ("weight", "bias")
        if f"transformer.ln_f.{kind}" in ours
    }
    return transformers.GPTNeoXForCausalLM, config, state


def tokenizer_of(name: str):
    """The tokenizer of data/, byte or gpt2, as one of transformers."""
    import transformers

    ours = load_tokenizer(name)
    vocabulary = {"".join(BYTE_CHARACTERS[b] for b in token): i for i, token in enumerate(ours.tokens)} | {
        "<|endoftext|>": ours.eot
    }
    merges = []
    if name == "gpt2":
        merges = [tuple(line.split(" ")) for line in lzma.decompress(VOCABULARY.read_bytes()).decode().splitlines()[1:]]
    return transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)


def export(run: str, which: str, out: Path) -> str:
    """Write the run's checkpoint to `out` and return a line about it. ValueError for what cannot be exported."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    state = checkpoint.load(checkpoint.find(run, which))
    model = checkpoint.build_model(state).eval()
    pos, eot = model.config.pos, state["tokenizer"]["eot"]
    if pos not in ("learned", "rope", "crope"):
        raise ValueError(
            f"{pos} cannot be exported: {REASONS.get(pos, 'no architecture of transformers has it')}. learned, rope and crope can"
        )
    if model.config.pos_options.get("explicit"):
        raise ValueError(
            "a rope model with explicit frequencies cannot be exported: GPT-NeoX computes its own from a base. Export the run it was made from"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: choose another --out, or remove it")
    kind, config, weights = (as_gpt2 if pos == "learned" else as_gpt_neox)(model, eot)
    theirs = kind(config).eval()
    for name, parameter in theirs.named_parameters():  # bias=False here is a bias of zeros there
        if name not in weights and name.endswith("bias"):
            weights[name] = torch.zeros_like(parameter)
    theirs.load_state_dict(weights, strict=True)
    theirs.save_pretrained(out)
    tokenizer_of(state["tokenizer"]["name"]).save_pretrained(out)

    read = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    idx = torch.randint(
        model.config.vocab_size, (1, model.config.block_size), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        difference = (read(input_ids=idx).logits - model(idx)[0]).abs().max().item()
    if not difference < TOLERANCE:
        raise ValueError(
            f"{out} was written, but its logits differ from the run's by {difference:.1e}, more than {TOLERANCE}: do not use it, and report this"
        )
    return f"{out}: {kind.__name__}, tokenizer {state['tokenizer']['name']}, step {state['step']}; largest difference of a logit {difference:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", help="a run's folder, or a checkpoint file")
    parser.add_argument(
        "--to", choices=("hf",), default="hf", help="hf: the transformers library (the default, and all there is)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a step number (default: last)")
    args = parser.parse_args()
    try:
        print(export(args.run, args.checkpoint, args.out))
    except ImportError:
        sys.exit("error: the export needs the transformers library: pip install -r requirements-dev.txt")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

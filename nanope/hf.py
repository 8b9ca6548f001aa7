"""To and from the transformers library. Nothing here knows the class of a model: functions take models, or what
builds one."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

# ---- GPT-2's weights in the layout of transformers


def load_gpt2(name: str | Path, build: Callable[..., nn.Module]) -> nn.Module:
    """build(**fields of a GPTConfig) with the weights of a GPT-2 in the transformers layout (config.json and
    safetensors): a local folder, or a name on the Hugging Face hub. ValueError for another architecture, OSError
    where nothing is found."""
    folder = folder_of(name)
    c = gpt2_config(folder)
    shape = {"vocab_size": c["vocab_size"], "n_layer": c["n_layer"], "n_head": c["n_head"], "n_embd": c["n_embd"]}
    model = build(block_size=c["n_positions"], **shape, dropout=0.0, bias=True, pos="learned")
    theirs, state = weights_of(folder), {}
    for key, ours in model.state_dict().items():
        source = "wte.weight" if key == "lm_head.weight" else key.removeprefix("transformer.")
        if source not in theirs:
            raise ValueError(f"{folder}: the weights lack {source}")
        value = theirs[source]
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.t()  # transformers' Conv1D holds (in, out)
        if value.shape != ours.shape:
            raise ValueError(f"{folder}: {source} has shape {tuple(value.shape)}, expected {tuple(ours.shape)}")
        state[key] = value
    model.load_state_dict(state)
    return model


def folder_of(name: str | Path) -> Path:
    """The local folder of a model, downloaded where `name` is none. OSError where the hub does not give it."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(str(name), allow_patterns=files))
    except Exception as error:
        raise OSError(f"{name} is no local folder, and the hub did not give it: {error}") from error


def gpt2_config(folder: Path) -> dict:
    """The content of config.json. ValueError where it is not GPT-2 as built here, OSError where it is missing."""
    if not (folder / "config.json").is_file():
        raise OSError(
            f"{folder} holds no config.json: expected a GPT-2 folder as transformers' save_pretrained writes it"
        )
    c = json.loads((folder / "config.json").read_text())
    expected = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    expected |= {"tie_word_embeddings": True, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for key, value in (expected | {"n_inner": None}).items():
        if c.get(key, value) != value and not (key == "n_inner" and c[key] == 4 * c.get("n_embd", 0)):
            raise ValueError(f"{folder}: {key} is {c[key]!r}; GPT-2 as built here has {value!r}")
    if missing := {"n_positions", "vocab_size", "n_layer", "n_head", "n_embd"} - c.keys():
        raise ValueError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
    return c


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder's safetensors, names without "transformer."."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(f"{folder} holds no .safetensors file; save the model with safe_serialization=True")
    try:
        return {k.removeprefix("transformer."): v for file in files for k, v in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder}: the weights are damaged: {error}") from error


# ---- our models as those of transformers

NOT_IN_TRANSFORMERS = {
    "comrope": "GPT-NeoX has one set of frequencies for all heads and layers, and comrope trains them for each",
    "carope": "no architecture of transformers has content-dependent frequencies",
    "alibi": "the ALiBi models of transformers (BLOOM, MPT) differ elsewhere: an additional LayerNorm, another GELU",
    "sinusoidal": "no causal GPT-2-style model of transformers adds sinusoids to the token embeddings",
    "none": "no GPT-2-style model of transformers is without positions",
}


def as_transformers(model: nn.Module, eot: int):
    """The model of transformers that computes the same as `model`, a GPT of any device, in eval mode on the CPU.

    GPT2LMHeadModel for `learned`, GPTNeoXForCausalLM for `rope` and `crope`. eot: the id of the end-of-text token.
    ValueError, with the reason, for a model that transformers does not have.
    """
    pos, window = model.config.pos, model.config.window
    if any(window) if isinstance(window, list) else window:
        raise ValueError(f"a model with window {window} cannot be exported: GPT-2 and GPT-NeoX have full attention")
    for switch, off in (("document_mask", False), ("qk_norm", False), ("logit_scale", "none")):
        if getattr(model.config, switch) != off:
            raise ValueError(f"a model with {switch} cannot be exported: GPT-2 and GPT-NeoX do not have it")
    if pos not in ("learned", "rope", "crope"):
        reason = NOT_IN_TRANSFORMERS.get(str(pos), "no architecture of transformers has it")
        raise ValueError(f"{pos} cannot be exported: {reason}. learned, rope and crope can")
    if model.config.pos_options.get("explicit"):
        raise ValueError(
            "a rope model with explicit frequencies cannot be exported: GPT-NeoX computes its own from a base. "
            "Export the run it was made from"
        )
    import transformers

    config, state = (as_gpt2 if pos == "learned" else as_gpt_neox)(model, eot)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in theirs.named_parameters():  # bias=False here is a bias of zeros there
        if name not in state and name.endswith("bias"):
            state[name] = torch.zeros_like(parameter)
    theirs.load_state_dict(state, strict=True)
    return theirs


def as_gpt2(model: nn.Module, eot: int):
    """(config, state) of the GPT2LMHeadModel that computes the same as a `learned` model."""
    import transformers

    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function="gelu_new", resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        layer_norm_epsilon=1e-5, bos_token_id=eot, eos_token_id=eot,
    )  # fmt: skip
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D holds (in, out)
    state = {
        name: value.t().contiguous() if name.endswith(linear) else value for name, value in model.state_dict().items()
    }
    return config, state


def partial_rotary_factor(width: int, D: int) -> float:
    """The part of a head's D channels that turns. The reader truncates: int(D · factor) is `width`, where that of
    width / D can be one less (30 of 44)."""
    factor = width / D
    return factor if int(D * factor) == width else math.nextafter(factor, 1)


# GPT-NeoX's names of the parts of a block
NEOX_NAMES = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_attn": "attention.query_key_value",
    "attn.c_proj": "attention.dense",
    "mlp.c_fc": "mlp.dense_h_to_4h",
    "mlp.c_proj": "mlp.dense_4h_to_h",
}


def as_gpt_neox(model: nn.Module, eot: int):
    """(config, state) of the GPTNeoXForCausalLM that computes the same as a `rope` or `crope` model.

    GPT-NeoX holds q, k, v as (H, 3, D) and pairs the turning channels i and i + width/2; here they are neighbours.
    """
    import transformers

    c, ours = model.config, model.to_rope().state_dict()
    D = c.n_embd // c.n_head
    width = round(c.pos_options["fraction"] * D)  # channels of a head that turn
    config = transformers.GPTNeoXConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        intermediate_size=4 * c.n_embd, hidden_act="gelu_new", attention_dropout=c.dropout, hidden_dropout=c.dropout,
        max_position_embeddings=c.block_size, layer_norm_eps=1e-5, bos_token_id=eot, eos_token_id=eot,
        tie_word_embeddings=True, use_parallel_residual=False, attention_bias=True,
        rope_parameters={
            "rope_type": "default", "rope_theta": c.pos_options["base"],
            "partial_rotary_factor": partial_rotary_factor(width, D),
        },
    )  # fmt: skip
    halves = [*range(0, width, 2), *range(1, width, 2), *range(width, D)]

    def qkv(value: torch.Tensor) -> torch.Tensor:
        """(3C, …) as (3, H, D) → (H, 3, D), q and k with their channels in halves."""
        q, k, v = value.unflatten(0, (3, c.n_head, D)).unbind(0)
        return torch.stack((q[:, halves], k[:, halves], v), 1).flatten(0, 2)

    wte = ours["transformer.wte.weight"]
    names = {"transformer.ln_f": "gpt_neox.final_layer_norm"}
    for i in range(c.n_layer):
        names |= {f"transformer.h.{i}.{name}": f"gpt_neox.layers.{i}.{theirs}" for name, theirs in NEOX_NAMES.items()}
    state = {"gpt_neox.embed_in.weight": wte, "lm_head.weight": wte}
    for name, theirs in names.items():
        for kind in ("weight", "bias"):
            if (value := ours.get(f"{name}.{kind}")) is not None:
                state[f"{theirs}.{kind}"] = qkv(value) if name.endswith("attn.c_attn") else value
    return config, state

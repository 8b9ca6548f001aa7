"""To and from the transformers library. Nothing here knows the class of a model: functions take models, or what
builds one."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from data.shards import Data
from data.tokenizer import load_tokenizer

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


# ---- models of the transformers library, to evaluate


@dataclass
class Shape:
    block_size: int
    pos: str
    pos_options: dict


class Pretrained(nn.Module):
    """A transformers causal LM from a local folder or a hub name, as transformers loads it, in float32.

    hidden(idx) (B, T) → (B, T, C) and lm_head.weight (V, C) give its logits, which is checked on a few tokens.
    OSError where nothing is found, ValueError for a model whose logits are made otherwise, or without transformers.
    """

    def __init__(self, name: str):
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise ValueError("--model needs the transformers library: pip install -r requirements-dev.txt") from None
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if not Path(name).is_dir() and (Path(name).exists() or name.count("/") > 1 or name.startswith(("/", "."))):
            raise OSError(f"no model folder {name}")
        try:
            self.net = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, attn_implementation="sdpa"
            )
        except Exception as error:  # of many kinds, most with advice of several lines
            raise OSError(
                f"{name} cannot be loaded as a causal language model of transformers: {str(error).strip().splitlines()[0]}"
            ) from error
        self.net.eval().requires_grad_(False)
        self.name, self.lm_head = name, self.net.get_output_embeddings()
        c = self.net.config
        length = getattr(c, "max_position_embeddings", None) or getattr(c, "n_positions", None)
        if not length:
            raise ValueError(f"{name} does not say its training length (max_position_embeddings)")
        self.config = Shape(length, c.model_type, {})
        tables = [
            m.num_embeddings
            for path, m in self.net.named_modules()
            if isinstance(m, nn.Embedding) and ("wpe" in path or "position" in path)
        ]
        self.table = length if tables else None
        idx = torch.arange(8)[None] % c.vocab_size
        with torch.no_grad():
            if not torch.allclose(
                self.hidden(idx) @ self.lm_head.weight.t(), self.net(input_ids=idx, use_cache=False).logits, atol=1e-4
            ):
                raise ValueError(
                    f"{name}: the logits of {c.model_type} are not its output layer times its last hidden state; such models cannot be evaluated here"
                )

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        return self.net.base_model(input_ids=idx, use_cache=False).last_hidden_state

    def check_length(self, length: int) -> None:
        if self.table and length > self.table:
            raise ValueError(
                f"the position table of {self.config.pos} ends at {self.table}: a length of {length} is not possible"
            )

    def scaled(self, rule: str, factor: float):
        raise ValueError("frequency scaling is there for runs of train.py, not for models of transformers")

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def sha256(self) -> str:
        """Identity of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.net.state_dict().items()):
            digest.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def check_tokenizer(self, data: Data, split: str) -> None:
        """ValueError unless the model's own tokenizer makes the data's ids of the data's text."""
        import transformers

        stream, ours = data.split(split), load_tokenizer(data.manifest["tokenizer"]["name"])
        start, size = max(stream.documents().tolist(), key=lambda d: d[1])
        ids = stream.read(start, start + min(size, 4096))
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(self.name)(ours.decode(ids), add_special_tokens=False)[
                "input_ids"
            ]
        except Exception as error:
            raise ValueError(
                f"{self.name} has no tokenizer that could be compared with the data's ({ours.name}); save it there: {str(error).strip().splitlines()[0]}"
            ) from error
        if not np.array_equal(
            theirs[: len(ids) - 16], ids[:-16]
        ):  # where the text is cut, the last word may encode otherwise
            raise ValueError(
                f"the tokenizer of {self.name} is not that of {data.folder} ({ours.name}): prepare the data with the model's own"
            )


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
            "rope_type": "default", "rope_theta": c.pos_options["base"], "partial_rotary_factor": width / D
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

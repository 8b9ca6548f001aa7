"""To and from the transformers library. Nothing here knows the class of a model: functions take models, or what
builds one."""

import json
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

"""What no model can be built of: the checks of model.py's GPTConfig."""

import math

import schemes


def problems_of(config) -> list[str]:
    """What is wrong with a config, a line for each problem."""
    problems = []
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            problems.append(f"{name} must be a positive whole number, not {value!r}")
    if type(config.dropout) not in (int, float) or not 0 <= config.dropout < 1:
        problems.append(f"dropout must lie in [0, 1), not {config.dropout!r}")
    for name in ("bias", "document_mask", "qk_norm"):
        if type(getattr(config, name)) is not bool:
            problems.append(f"{name} must be True or False, not {getattr(config, name)!r}")
    if config.document_mask is True and type(config.eot) is not int:
        problems.append(f"document_mask needs eot, the id of the token that ends a document, not {config.eot!r}")
    if config.logit_scale not in ("none", "log"):
        problems.append(f"logit_scale must be 'none' or 'log', not {config.logit_scale!r}")
    start = config.logit_scale_start
    if start is not None and not (type(start) in (int, float) and 0 < start < math.inf):
        problems.append(f"logit_scale_start must be a positive number or None, not {start!r}")
    if not isinstance(config.pos_options, dict):
        problems.append(f"pos_options must be a mapping of option to value, not {config.pos_options!r}")
    if not problems and config.n_embd % config.n_head:
        problems.append(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
    windows = config.window if isinstance(config.window, list) else [config.window]
    if not windows or not all(type(w) is int and w >= 0 for w in windows):
        problems.append(f"window must be a whole number from 0 on, or a list of them, not {config.window!r}")
    problems += schemes.problems_of(config.pos, config.pos_options)
    for name, entries in (("pos", config.pos), ("window", config.window)):
        if isinstance(entries, list) and type(config.n_layer) is int and len(entries) > config.n_layer:
            problems.append(f"{name} has {len(entries)} entries for {config.n_layer} layers: some would never be used")
    return problems

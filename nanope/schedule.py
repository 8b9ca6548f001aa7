"""The learning rate of each step, and warm-ups that do not fit the run. `config` is a RunConfig."""

import math


def learning_rate(step: int, config) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return scheduled(step, config)


def scheduled(step: int, config) -> float:
    """The learning rate of a step without the warm-up."""
    peak, last = config.learning_rate, config.max_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "step":
        return peak * config.lr_gamma ** (step // config.lr_step)
    if config.schedule == "wsd":
        decay = config.decay_fraction * last
        return config.min_lr + (peak - config.min_lr) * min(1.0, max(0.0, last - step) / decay)
    return peak


def jump(config) -> str | None:
    """What the learning rate does where the warm-up reaches into the decay of a schedule; None where it does not."""

    def decayed(step: int) -> bool:
        return not math.isclose(scheduled(step, config), config.learning_rate, rel_tol=1e-9)

    end = config.warmup_steps
    if config.schedule not in ("wsd", "step") or not 0 < end < config.max_steps or not decayed(end - 1):
        return None
    return (
        f"warmup_steps {end} reaches into the decay of schedule {config.schedule}: the learning rate jumps from "
        f"{config.learning_rate:.3g} in step {end} to {scheduled(end, config):.3g} in the next; with at most "
        f"{next(filter(decayed, range(end)))} steps of warm-up it does not"
    )


def warning(config) -> str | None:
    """What to say of a warm-up that does not fit the run, which may be meant, as in a short trial; None where there is
    nothing to say."""
    end, last = config.warmup_steps, config.max_steps
    if end < max(last, 2):
        return jump(config)
    text = f"warmup_steps {end} is as long as the run of {last} step(s): the learning rate only rises, to "
    text += f"{learning_rate(last - 1, config):.3g} in the last step"
    return text + (f", and never reaches {config.learning_rate:.3g}" if end > last else "")

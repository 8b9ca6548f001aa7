"""What is known of a GPU by its name: peak FLOP/s, and the part of it to expect."""

import torch

# Peak dense FLOP/s in bfloat16 with float32 sums (float16 for V100 and T4, which have no bfloat16), by words of a GPU's
# name, all of which it has. NVIDIA's data sheets, less the factor 2 of sparsity that some of them include. A 4090 D has
# 14,592 of a 4090's 16,384 cores
PEAK_FLOPS = {"GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H200 NVL": 835e12}
PEAK_FLOPS |= {"H100": 989e12, "H100 PCIE": 756e12, "H100 NVL": 835e12, "H800": 989e12, "H800 PCIE": 756e12}
PEAK_FLOPS |= {"H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 150e12, "A30": 165e12, "A10": 125e12}
PEAK_FLOPS |= {"A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A6000": 155e12, "5090": 209e12}
PEAK_FLOPS |= {"4090": 165e12, "4090 D": 147e12, "3090": 71e12, "V100": 125e12, "V100 PCIE": 112e12, "T4": 65e12}
# Multiprocessors of the whole card: a slice of it (MIG) has its share of them
MULTIPROCESSORS = {"GH200": 132, "H200": 132, "H200 NVL": 132, "H100": 132, "H100 PCIE": 114, "H100 NVL": 132}
MULTIPROCESSORS |= {"H800": 132, "H800 PCIE": 114, "H20": 78, "A100": 108, "A800": 108, "A30": 56}
OTHER_CHIPS = {"LAPTOP", "TI", "SUPER", "MAX", "D"}  # words that make another card of a name

# Model FLOPs utilisation to expect where nothing was measured: guesses. On 8 A100, GPT-2 124M at length 1,024,
# nanoGPT's README has 0.29 (600,000 iterations of 491,520 tokens in about 4 days) and llm.c 0.60 (1.75 M tokens/s). An
# H100 has 3.2 times an A100's FLOP/s, and 1.6 times its bandwidth
MFU = {"A100": 0.5, "H100": 0.35}
USUAL_MFU = 0.4  # of other cards


def card_of(name: str) -> str | None:
    """The key of PEAK_FLOPS for a GPU called `name` by its driver; None where it is not known."""
    words = set(name.upper().replace("-", " ").split())
    found = [card for card in PEAK_FLOPS if words >= set(card.split())]
    card = max(found, key=lambda card: len(card.split()), default=None)
    return None if card is None or (words & OTHER_CHIPS) - set(card.split()) else card


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device where they are known, else None."""
    if device.type != "cuda":
        return None
    here = torch.cuda.get_device_properties(device)
    if (card := card_of(here.name)) is None:
        return None
    if "MIG" in here.name.split():
        whole = MULTIPROCESSORS.get(card)
        return whole and PEAK_FLOPS[card] * here.multi_processor_count / whole
    return PEAK_FLOPS[card]


def expected_mfu(card: str | None) -> float:
    """The MFU to expect of a card of PEAK_FLOPS."""
    return MFU.get((card or "").split(" ")[0], USUAL_MFU)

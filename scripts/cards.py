"""Write docs/schemes.md and the pictures in docs/schemes/: a card per positional scheme.

python scripts/bench.py train --schemes all --no_peer --json results/scheme-speed/speed.json   # first, when idle
python scripts/cards.py
"""

import argparse
import json

import _root  # noqa: I001

from nanope import REPO, cards
from nanope.bench.train import relative


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    with open(REPO / "results" / "scheme-speed" / "speed.json") as file:
        record = json.load(file)
    shape = (
        f"{record['n_layer']} × {record['n_embd']}, vocabulary {record['vocab_size']:,}, length {record['block_size']}"
    )
    machine = (
        f"Measured on {record['device']}, {record['threads']} thread, {shape}; medians of {record['rounds']} rounds."
    )
    for path in cards.write(REPO / "docs", relative(record), machine):
        print(path.relative_to(REPO))


if __name__ == "__main__":
    main()

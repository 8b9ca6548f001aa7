"""Test a positional scheme, also one that is in no registry: what holds for every scheme, check by check.

    python scripts/check_scheme.py my_file.py:MyScheme
    python scripts/check_scheme.py rope+my_file.py:MyScheme --options '{MyScheme: {start: 2.0}}' --window 8

Exit status 1 where a check fails. nanope/conformance.py has the checks; docs/adding-a-scheme.md has an example.
"""

import argparse
import sys

import _root
import torch

from data.shards import output
from nanope.conformance import CHECKS, Case, run
from nanope.values import number, read_yaml


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/check_scheme.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("pos", help="as a config has it: a name, my_file.py:MyScheme, a+b, or a list [a, b]")
    parser.add_argument("--options", default="{}", help="pos_options as YAML")
    parser.add_argument("--window", default="0", help="window as YAML: a number, or a list (default: 0, all tokens)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        pos, options, window = (number(read_yaml(text)) for text in (args.pos, args.options, args.window))
        found = run(Case(pos, options, {"window": window}))
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, error in found.items():
        what = CHECKS[name].__doc__.splitlines()[0]
        output(f"{'FAIL' if error else 'ok':4}  {name.replace('_', ' ')}: {error or what}")
    failed = sum(error is not None for error in found.values())
    output(f"\n{len(found) - failed} of {len(found)} checks passed")
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()

"""For a command that is started by its file: puts the repository's root on the path, and the command's own folder last.

Python puts that folder first, where scripts/lm_eval.py would hide the package that it runs."""

import sys
from pathlib import Path

here = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0]).resolve() == here:
    sys.path.append(sys.path.pop(0))
if str(here.parent) not in sys.path:
    sys.path.insert(0, str(here.parent))

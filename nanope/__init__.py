"""What makes training and evaluation fast and unbreakable. Read model.py, train.py and eval.py first."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

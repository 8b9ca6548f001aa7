"""Speed and memory of training, evaluation, data preparation and the batch feed; scripts/bench.py runs them."""

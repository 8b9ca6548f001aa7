"""Evaluation: protocols, scoring, statistics, the retrieval probe, comparisons of runs."""

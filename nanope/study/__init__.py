"""Studies: a grid of runs, how they are run, and the tables and figures that they give."""

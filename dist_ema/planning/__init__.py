"""Predicts what averages will cost, before there is a run."""

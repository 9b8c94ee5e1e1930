"""What averages will cost, before there is a run."""

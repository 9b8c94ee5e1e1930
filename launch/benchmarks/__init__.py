"""What ``launch/benchmark.py`` measures: one file a table, everyone side by side in one run."""

"""What ``launch/train.py`` runs: a byte-level GPT, every engine, and the public calls of dist_ema."""

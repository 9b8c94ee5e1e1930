"""One line in everyone's trainer. Each module imports its trainer; nothing else here does."""

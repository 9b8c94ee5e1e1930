"""Averages on disk: how they get there, and back. The only part of the library that opens files."""

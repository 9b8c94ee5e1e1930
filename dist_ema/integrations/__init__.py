"""Connects averages to trainers, with one line in the user's program. Each module imports its trainer; no other package
does.
"""

"""The commands, grouped by what they work on; `cli.py` puts them together."""

"""The two stages of alignkd and the parts they are made of: everything that knows models."""

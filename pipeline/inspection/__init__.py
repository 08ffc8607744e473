"""A look at one stored sample: its text, and what its teacher and a student attend to."""

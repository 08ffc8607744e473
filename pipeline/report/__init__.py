"""One HTML page about a run, an experiment or a sweep: what was measured, and what it cost."""

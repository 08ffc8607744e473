"""Stage 2: a student trained from a store, with no teacher in memory."""

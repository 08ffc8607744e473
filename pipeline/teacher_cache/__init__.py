"""Stage 1: shards through the teacher into a store."""

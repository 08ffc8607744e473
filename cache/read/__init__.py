"""Reading a store: samples by key, chunk by chunk."""

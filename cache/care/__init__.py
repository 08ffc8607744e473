"""Care of a store: verify, repair, summaries, subsets, pushing it to a server."""

"""The conformance suite: what must hold of a model before its numbers can be trusted."""

"""The training of a twig, with the base's stored hidden states in place of the base."""

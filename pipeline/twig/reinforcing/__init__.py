"""Reinforcement learning of a twig's pruning head: choices of vision tokens, and the base's own word on them."""

"""A twig: a small trained module on an early layer of a frozen model, for pruning and for drafts."""

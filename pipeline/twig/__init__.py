"""A twig: a small trained module on an early layer of a frozen model, which prunes vision tokens and drafts tokens."""

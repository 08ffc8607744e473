"""The demo and the emoji study: users of the product."""

"""The demo and the emoji study, which use the product as anyone may."""

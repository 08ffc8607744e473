"""Writing a store: parts, leases, and the locks between writers."""

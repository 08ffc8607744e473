"""Where bytes lie: local and remote files, and what survives a crash."""

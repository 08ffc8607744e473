"""The targets: what is kept of a teacher."""

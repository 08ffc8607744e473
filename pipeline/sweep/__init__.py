"""Many student experiments from one store: what is varied, running it, writing it down, summing it up."""

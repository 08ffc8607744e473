"""Many student experiments from one store: planning, running, recording and summarising them."""

"""The student with its trained heads and adapters."""

"""Care of a teacher cache: plan, check, repair, slice, describe."""

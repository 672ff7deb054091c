"""What comes in: a classifier and texts."""

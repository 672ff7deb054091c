"""What is done to the weights."""

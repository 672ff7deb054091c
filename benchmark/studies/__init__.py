"""What is measured now and then, each with a command of its own."""

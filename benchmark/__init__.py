"""The careful numbers of the lab: `python -m benchmark`. Nothing in `lab04/` or in the four scripts imports it."""

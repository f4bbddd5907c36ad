"""The report of a run: answers to one's own pictures, failures with what may explain them."""

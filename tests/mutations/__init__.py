"""Small faults put into a copy of the tree, one at a time: does a named test notice? `python -m tests.mutations`."""

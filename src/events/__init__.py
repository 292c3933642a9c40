"""The log of what happened: read live, and again from any place in it."""

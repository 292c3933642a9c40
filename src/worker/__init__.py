"""Runs jobs: claims them, works on them, settles them."""

"""Jobs: put one, change its state, report its progress."""

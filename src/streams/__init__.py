"""What subscriptions deliver: one source for each field."""

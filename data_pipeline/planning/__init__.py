"""Which sample comes when, and which tasks it serves."""

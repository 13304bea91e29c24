"""What units cost: closed forms, what they are counted from, latency."""

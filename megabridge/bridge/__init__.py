"""AutoBridge, and what it is made of."""

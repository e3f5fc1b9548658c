"""AutoBridge and the modules that it forwards to."""

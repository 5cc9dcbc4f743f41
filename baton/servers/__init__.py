"""HTTP clients, and server processes and their state."""

"""Where programs run. Standard library and baton/*.py only, since it also runs on login nodes."""

"""A program that checks data and converts it to Baton's records: `python -m baton.data`."""

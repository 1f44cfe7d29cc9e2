"""A model for people who use it: text from the command line."""

"""Recipes: the typed schema, values in one key language, and the built-in ones, one file a table."""

"""Commands beside server and client: check, compare."""

"""The teacher cache, measured. See __main__.py."""

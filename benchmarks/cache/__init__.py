"""The teacher cache, measured. See measure.py."""

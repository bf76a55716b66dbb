"""Does distillation help? See __main__.py."""

"""Losses and trainers under the names and signatures of other libraries, one module each.

Importing a module needs its host library only where it subclasses something of it.
"""

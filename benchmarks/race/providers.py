"""Everybody in the race, in the order of the table."""

from .floor import LEAST
from .peers import PEERS
from .plain import PLAIN
from .provider import Provider

PROVIDERS: dict[str, Provider] = {each.name: each for each in [*PLAIN, *PEERS, *LEAST]}

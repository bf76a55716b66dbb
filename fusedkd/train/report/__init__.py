"""Did it work? What a run came to, for people and for machines: held-out losses before and after,
what the models write, where the time went."""

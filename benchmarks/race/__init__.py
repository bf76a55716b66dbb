"""The race against peers: `fusedkd bench`."""

"""``make gpu``: what one short visit to a GPU can tell, in one command and without installing."""

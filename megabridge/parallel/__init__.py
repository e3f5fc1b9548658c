"""Ranks: topology, process groups, and what ranks say to one another."""

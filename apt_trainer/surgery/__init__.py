"""Changing the shape of a model in place: slicing, cutting, masks, adapters, and what trains."""

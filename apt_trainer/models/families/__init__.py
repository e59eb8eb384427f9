"""One file a family: tables of module names."""

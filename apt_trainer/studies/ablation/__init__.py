"""Studies: variants of one recipe and seeds, run side by side. Not for their tables: see ``report.comparison``."""

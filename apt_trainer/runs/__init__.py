"""A recipe from start to folder: checks, the dry run, the run."""

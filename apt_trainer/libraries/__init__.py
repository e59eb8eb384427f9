"""What is relied on of other libraries: versions, names that they do not promise to keep, and how they call."""

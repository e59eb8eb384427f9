"""Checkpoints of a run in progress: what is in one (``state``), that it appears as a whole (``whole``), which is the
best (``best``) and how a run goes on from one (``resume``)."""

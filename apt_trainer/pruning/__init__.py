"""The method without a Trainer: one object that scores, decides and cuts, and the budgets it keeps."""

"""What is written and read: the format of a saved model, pretrained models, events, the lock of a folder."""

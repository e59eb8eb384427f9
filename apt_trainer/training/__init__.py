"""The method inside a Hugging Face Trainer: its loop, changes of shape, engines and checkpoints."""

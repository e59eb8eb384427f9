"""A saved model beside a dense one: size, operations, speed and memory, with the noise of what was timed."""

"""What ``apt-trainer analyze``, ``drop`` and ``paint`` do: from a model and a text to scores, or to another model.

Everything that can be refused is refused before weights load. Not for the scores themselves (``scoring.sublayers``).
"""

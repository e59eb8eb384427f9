"""What ``apt-trainer analyze`` and ``apt-trainer drop`` do: from a model and a text to scores, or to a smaller model.

Everything that can be refused is refused before weights load. Not for the scores themselves (``sublayers``).
"""

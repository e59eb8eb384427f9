"""Records of a run and what is made from them: events, pictures and tables.

Reads and writes files and numbers only, never a model. Import the module that is needed: ``events`` loads nothing
heavy, ``plots`` loads matplotlib.
"""

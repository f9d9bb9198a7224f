"""What a module's forward does, as data.

``ir`` has the nouns. ``interpreter`` follows a forward's source (``source``) and reads what it names (``objects``, ``calls``, ``values``);
every read is a fact (``facts``), every operation stands in a trace (``trace``, ``recorder``). ``analysis`` makes a graph of the traces, as
``match`` reads a residual block and ``network`` a network.
"""

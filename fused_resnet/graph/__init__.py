"""What a module's forward does, as data.

``ir`` has the nouns. ``analysis`` follows a forward's source (``source``, ``expressions``) and reads what it names (``objects``,
``calls``, ``values``; ``originals``: what torch's own layers are); every read is a fact (``facts``, natively ``checked``), every operation
stands in a trace (``trace``, ``recorder``). Of the traces it makes a graph, as ``match`` reads a residual block and ``network`` a network.
"""

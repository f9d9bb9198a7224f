"""What a module's forward does, as data: found from its source (``analysis``), read as a residual block (``match``).

``ir`` has the nouns and imports nothing of the room; ``source``, ``facts``, ``objects``, ``calls``, ``recorder`` and ``interpreter`` find
what a forward does; ``match`` says what it is.
"""

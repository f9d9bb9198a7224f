"""What a converted module runs: ``fused`` is its forward, ``bound`` its graph with its own layers, ``inline`` a network's children looked
through, ``executor`` runs it: as native calls (``program`` plans and packs, ``cached`` repeats) or node by node. ``fold`` puts a norm into its
convolution's weight, ``pooling`` is a max pooling, ``training`` says what one layer does for the next in a step of training, and ``stages``
shows a native call to the profiler.
"""

"""What a converted module runs: ``fused`` is its forward, ``executor`` runs its graph, ``whole`` a block in one native call, ``fold`` puts a
batch norm into its convolution's weight, and ``pooling`` is a max pooling.
"""

"""From the network's outputs to labels and affinities of a block."""

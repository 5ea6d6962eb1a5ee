"""A short job that times one block on a node of the cluster, for `agq plan --submit`."""

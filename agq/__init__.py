"""Neuron segmentation of large electron-microscopy volumes with affinity-guided queries.

The three sub-packages are the top-level folders of the repository; `agq/` links to them.
"""

"""Crops to train on, and what the network should answer for them."""

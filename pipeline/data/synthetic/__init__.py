"""A seeded EM-like volume with ground truth."""

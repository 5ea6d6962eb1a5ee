"""The AGQ network: tensors and checkpoints; nothing of volumes on disk or clusters."""

"""Blocks of a volume: numbers, ids, and what is stored beside the labels of one."""

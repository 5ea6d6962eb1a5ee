"""Skeletons of segments: traced window by window, joined segment by segment."""

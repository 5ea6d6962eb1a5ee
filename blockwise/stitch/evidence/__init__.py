"""Contacts between fragments, in integers that add up in any order."""

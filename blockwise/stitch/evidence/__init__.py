"""Who touches whom, in integers that add up in any order."""

"""From merges to segment ids, and the table of segments."""

"""The command line, one module for each group of commands."""

from agq.blockwise.spawn import search_named_folders_only

# Before anything else is looked for.
search_named_folders_only()

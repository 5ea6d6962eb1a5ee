"""Pictures of a run: neuroglancer, png, html."""

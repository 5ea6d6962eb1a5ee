"""Meshes of segments: surfaces block by block, merged, simplified, encoded for neuroglancer.

1. `cells`: every cell of 2 x 2 x 2 voxels belongs to one block and gives the triangles of each
   label in it, so a block needs one voxel more than its own, and nothing of its neighbours' meshes.
2. `fragments`: a block's triangles, by segment, in one file.
3. `surface`: the fragments of a segment become one closed surface, which is simplified.
4. `encode`: Draco, manifest and shards.
5. `run`: the steps on dask.
"""

"""Meshes of segments: surfaces block by block, merged, simplified, encoded for neuroglancer.

1. `cells`: every cell of 2 x 2 x 2 voxels belongs to one block and gives the triangles of each
   label in it, so a block needs one voxel more than its own, and nothing of its neighbours' meshes.
2. `fragments`: a block's triangles, by segment, in one file.
3. `index`: which of these files hold the segments of a shard.
4. `surface`: the fragments of a segment become one closed surface, which is simplified, in levels.
5. `octree`: each level is cut into cells, which fit together.
6. `encode`: Draco, manifest and shards.
7. `run`: the steps on dask.
"""

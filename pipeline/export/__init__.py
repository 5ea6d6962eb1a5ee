"""Files for other programs: one layer of a run, or a part of it, as TIFF, HDF5 or OME-Zarr."""

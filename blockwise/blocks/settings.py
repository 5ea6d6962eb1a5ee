"""The settings of the block grid."""

from pydantic import model_validator

from agq.settings import Margin, Settings, Size


class BlocksSettings(Settings):
    """How the volume is cut into blocks (z, y, x), in voxels."""

    read_shape: Size | None = None
    """What the network sees; default: what the checkpoint recommends, or the size that it was
    trained at."""

    before: Margin = (0, 0, 0)
    """Context read before the written part, per axis."""

    after: Margin = (1, 1, 1)
    """Context read after the written part, per axis; (0,0,0) and (1,1,1) is the published
    overlap of one voxel."""

    @model_validator(mode="after")
    def _write_shape_is_positive(self) -> "BlocksSettings":
        if self.read_shape is not None:
            self.write_shape(self.read_shape)
        return self

    def write_shape(self, read_shape: Size) -> Size:
        """Return what a block writes of what it reads.

        Raises
        ------
        ValueError
            If that is nothing.
        """
        written = []
        for axis, read, low, high in zip("zyx", read_shape, self.before, self.after, strict=True):
            if read <= low + high:
                raise ValueError(
                    f"read_shape {read} on {axis} leaves nothing to write after the context "
                    f"{low} + {high}; enlarge read_shape or shrink before/after"
                )
            written.append(read - low - high)
        return written[0], written[1], written[2]

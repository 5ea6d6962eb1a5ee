"""Reports as tables: in a terminal, and in a notebook."""

import io
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


class Tabled(ABC):
    """Base of reports that have a table; a notebook shows it."""

    @abstractmethod
    def table(self) -> "RenderableType":
        """Return the report for a rich console."""

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), record=True, width=120, force_jupyter=False)
        console.print(self.table(), soft_wrap=True)
        style = "font-family:monospace;line-height:normal"
        return console.export_html(
            code_format=f'<pre style="{style}">{{code}}</pre>', inline_styles=True
        )

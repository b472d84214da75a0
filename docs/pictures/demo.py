"""Makes the pictures of the README from one run of ``lightning-lora demo``: what it says and what it draws.

    python docs/pictures/demo.py [--out docs/pictures]

The command runs for real, in a terminal of its own (Linux, macOS; extras: cli, plot), about a minute on two free
cores. In the SVG text stays text, in whatever monospaced font the reader has: every piece says how wide it is, so that
columns stay columns.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[2]
COLUMNS = 100
RUN = "import sys; from lightning_lora.cli.main import main; sys.exit(main())"
DARK_ON_WHITE = TerminalTheme(
    (255, 255, 255),
    (24, 24, 24),
    [
        (24, 24, 24),
        (160, 30, 20),
        (15, 105, 45),
        (125, 85, 0),
        (20, 75, 155),
        (115, 35, 125),
        (0, 100, 115),
        (95, 95, 95),
    ],
    [(110, 110, 110)] * 8,
)
"""Every colour is dark enough to be read in black and white."""
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"
role="img" aria-label="lightning-lora demo">
<style>
.{unique_id}-matrix {{
  font-family: Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; font-size: {char_height}px
}}
{styles}
</style>
<rect x="1" y="1" width="99.8%" height="99.7%" rx="8" fill="#ffffff" stroke="#8c8c8c"/>
<g transform="translate({terminal_x}, 22)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def main() -> None:
    """Run the demo, then draw what it said, and keep what it drew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (options.out / "demo.svg").write_text(draw(record("demo", folder=Path(folder))))
        record("plot", "lora_demo", "--what", "spectra", "--out", "lora_demo/spectra.png", folder=Path(folder))
        for name in ("loss", "memory", "spectra"):
            shutil.copy(Path(folder, "lora_demo", f"{name}.png"), options.out / f"demo-{name}.png")


def record(*arguments: str, folder: Path) -> str:
    """Run ``lightning-lora`` in a terminal and return all that it writes there.

    Raises:
        SystemExit: If it fails.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    command = [sys.executable, "-c", RUN, *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    said = bytearray()
    try:
        while part := os.read(ours, 1 << 16):
            said += part
    except OSError:  # how Linux says that the other end is closed
        pass
    if process.wait():
        sys.exit(said.decode())
    return said.decode()


def draw(said: str) -> str:
    """Return a terminal's last state as an SVG; of a line that was written over and over, the last version stays."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.assemble(("$ lightning-lora demo", "bold")))
    last = re.sub(r"[^\n]*\r", "", said.replace("\r\n", "\n"))
    console.print(Text.from_ansi(last.strip()), overflow="fold")
    return console.export_svg(theme=DARK_ON_WHITE, code_format=PAGE, font_aspect_ratio=0.602, unique_id="demo")


if __name__ == "__main__":
    main()

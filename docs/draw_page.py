"""Pictures of the chat page, wide and narrow, by a headless Chromium: `python -m docs.draw_page RUN QUESTION`."""

import shutil
import sys
from pathlib import Path

from benchmarks.serving import serving
from tests.serving.chromium import opened

IMAGES = Path(__file__).parent / "images"
SIZES = {"page.png": (1100, 640), "page-narrow.png": (390, 760)}
TOKEN = 5  # of the answer, whose experts are shown


def main(checkpoint: str, question: str) -> None:
    """Asks, points at a token of the answer, and takes the pictures."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("Chromium is not installed (Debian: apt-get install chromium)")
    with serving(checkpoint, 4) as (url, _), opened(chromium) as page:
        for name, (width, height) in SIZES.items():
            page.size(width, height)
            page.open(url + "/")
            page.wait("document.title !== 'mixtral_jax'")
            page.run(f"""
                document.getElementById('text').value = {question!r};
                document.getElementById('length').value = 60;
                document.getElementById('layer').value = '1';
                document.getElementById('ask').requestSubmit();""")
            page.wait("document.getElementById('stop').disabled && document.querySelector('.answer span')")
            page.run(f"""document.querySelectorAll('.answer span')[{TOKEN}]
                .dispatchEvent(new Event('mouseover', {{bubbles: true}}));""")
            page.screenshot(IMAGES / name)
            print(f"wrote {IMAGES / name}")


if __name__ == "__main__":
    main(*sys.argv[1:])

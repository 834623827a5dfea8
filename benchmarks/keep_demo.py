"""Keep the demo's numbers and two of its pictures: what README shows.

make demo && python benchmarks/keep_demo.py
"""

import base64
import re
import shutil
from pathlib import Path

RUN, RESULTS = Path("runs/demo"), Path(__file__).parent / "results"


def main() -> None:
    shutil.copy(RUN / "demo.json", RESULTS / "demo.json")
    shutil.copy(RUN / "compare.png", RESULTS / "demo-compare.png")
    page = (RUN / "basis-report.html").read_text(encoding="utf-8")
    first = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert first is not None, "the basis report has no picture"
    (RESULTS / "demo-basis.png").write_bytes(base64.b64decode(first[1]))


if __name__ == "__main__":
    main()

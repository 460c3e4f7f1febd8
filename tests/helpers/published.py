"""The results that this repository publishes: where their files lie, and the command that writes their pages anew."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Published:
    """A results file, the pages that are written from it, and the folder of its pictures."""

    results: Path
    pages: tuple[Path, ...]
    pictures: Path

    @property
    def command(self) -> str:
        results, pictures, *pages = (str(path.relative_to(ROOT)) for path in (self.results, self.pictures, *self.pages))
        return f"rtrl report {results} --pictures {pictures} --format svg " + " ".join(f"--update {p}" for p in pages)


CLAIMS = Published(RESULTS / "results.json", (RESULTS / "claims.md",), RESULTS / "pictures")
CLAIMS_FULL = Published(RESULTS / "results-full.json", (RESULTS / "claims-full.md",), RESULTS / "pictures-full")
PERFORMANCE = Published(RESULTS / "performance.json", (RESULTS / "performance.md",), RESULTS / "pictures-performance")
DEVICE = Published(RESULTS / "device.json", (RESULTS / "device.md",), RESULTS / "pictures-device")
ALL = {"claims": CLAIMS, "claims-full": CLAIMS_FULL, "performance": PERFORMANCE, "device": DEVICE}

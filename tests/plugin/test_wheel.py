"""What the wheel holds: all that the package reads at run time, and nothing else."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

MOST_BYTES_OF_ASSETS = 12_000_000


def test_wheel_holds_the_package_and_all_its_data(wheel_file: Path, repository: Path):
    with zipfile.ZipFile(wheel_file) as archive:
        names = set(archive.namelist())
    walked = os.walk(repository / "lavis_chatbridge", followlinks=True)  # configs/projects is a link
    sources = {Path(folder, name).relative_to(repository).as_posix() for folder, _, files in walked for name in files}
    expected = {name for name in sources if "__pycache__" not in name}
    held = {name for name in names if ".dist-info/" not in name}
    assert held == expected
    assert "lavis_chatbridge/configs/projects/eval/okvqa.yaml" in held


def test_wheel_names_the_door_and_the_command(wheel_file: Path):
    with zipfile.ZipFile(wheel_file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "[torch.backends]\nlavis_chatbridge = lavis_chatbridge:activate" in text
    assert "chatbridge = lavis_chatbridge.cli:main" in text


def test_what_ships_beside_the_code_stays_small(repository: Path):
    assets = repository / "lavis_chatbridge" / "assets"
    sizes = {path: path.stat().st_size for path in assets.rglob("*") if path.is_file()}
    assert len(sizes) > 5
    assert sum(sizes.values()) <= MOST_BYTES_OF_ASSETS, sizes

"""How much memory is free, as a control group tells it."""

from pathlib import Path

import pytest

from ddpm_jax.core import room


@pytest.mark.parametrize(
    ("most", "free"), [("1000", 1000 - 700 + 150 + 50), ("500", 0), ("max", 4096 * 1024), ("9999999999", 4096 * 1024)]
)
def test_files_that_are_only_cached_count_as_free(most, free, tmp_path, monkeypatch):
    group = {"memory.max": most, "memory.current": "700", "memory.stat": "anon 500\nactive_file 150\ninactive_file 50"}
    files = {"/proc/meminfo": "MemTotal: 8192 kB\nMemAvailable: 4096 kB"}
    files |= {f"/sys/fs/cgroup/{name}": text for name, text in group.items()}
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert room.free_memory() == free

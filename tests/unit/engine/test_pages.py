import pytest

from asyncckpt.engine.pages import anonymous_map, host_takes_free_pages

REPORTS = "0110010100000000000000000000000010000000"
REPORTS_NOT = "0110000100000000000000000000000010000000"


def device(folder, name, kind, features):
    (folder / name).mkdir()
    (folder / name / "device").write_text(f"{kind:#06x}\n")
    (folder / name / "features").write_text(features + "\n")


@pytest.mark.parametrize(("features", "taken"), [(REPORTS, True), (REPORTS_NOT, False), ("", False)])
def test_a_balloon_with_page_reporting_means_that_the_host_takes_free_pages(tmp_path, features, taken):
    device(tmp_path, "virtio1", 2, REPORTS)  # a disk: its bit 5 is read-only
    device(tmp_path, "virtio2", 5, features)
    assert host_takes_free_pages(tmp_path) is taken


def test_a_machine_without_such_devices_keeps_its_memory(tmp_path):
    assert host_takes_free_pages(tmp_path / "nothing") is False
    device(tmp_path, "virtio1", 2, REPORTS)
    assert host_takes_free_pages(tmp_path) is False


@pytest.mark.parametrize("size_bytes", [0, 1, 5000, 2**22])
def test_memory_is_writable_and_as_large_as_asked_for(size_bytes):
    memory = anonymous_map(size_bytes)
    assert len(memory) == size_bytes
    memory[:] = b"x" * size_bytes
    assert bytes(memory) == b"x" * size_bytes

"""What the losses on attention hold beside queries, keys and values."""

from fusedkd.benchmarks.attention import peaks
from fusedkd.benchmarks.child import in_child


def test_scores_never_exist_in_full() -> None:
    """All of one side's are 12 x 1,024 x 1,024 x 4 bytes: 48 MiB."""
    held = in_child(peaks, "relation_kl", 1, 12, 1024, timeout=120)
    assert held["fusedkd"] < 64 << 20 < 400 << 20 < held["torch"]

"""A drawn split."""

from mmcli.heads.evaluation.division import SplitOptions, divide


def test_a_class_that_is_all_copies_of_another_trains_only():
    labels = {str(guid): "ab"[guid % 2] for guid in range(60)} | {str(guid): "c" for guid in range(60, 64)}
    groups = {guid: int(guid) if int(guid) < 60 else int(guid) - 60 for guid in labels}
    division = divide(labels, groups, SplitOptions())
    assert division.counts["rare_classes"] == {"c": 4}
    assert {"60", "61", "62", "63", "0", "1", "2", "3"} <= set(division.split.train)

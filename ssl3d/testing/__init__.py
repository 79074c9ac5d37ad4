"""Conformance suites for plugin authors: ``check_method("my_method").assert_passed()`` and its like."""

from ssl3d.testing.checks import Report as Report
from ssl3d.testing.report import check_backbone as check_backbone
from ssl3d.testing.report import check_dataset as check_dataset
from ssl3d.testing.report import check_format as check_format
from ssl3d.testing.report import check_logger as check_logger
from ssl3d.testing.report import check_method as check_method
from ssl3d.testing.report import check_task as check_task

"""Conformance suite for plugin authors: ``check_method("my_method").assert_passed()``."""

from ssl3d.testing.report import Report as Report
from ssl3d.testing.report import check_method as check_method

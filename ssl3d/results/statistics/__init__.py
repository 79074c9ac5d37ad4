"""Statistics of the table: intervals, comparisons, ranks, label efficiency."""

"""From records to a table."""

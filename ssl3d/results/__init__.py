"""Result records: the store, tables and their formats. Never imports torch."""

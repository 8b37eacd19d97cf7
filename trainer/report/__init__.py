"""Results for readers: the report page, runs side by side, tables for the terminal."""
